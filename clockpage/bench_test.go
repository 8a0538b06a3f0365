package clockpage

import "testing"

func BenchmarkSetOrder(b *testing.B) {
	p, _ := newPage(b)
	order := Order{Pause: 1, Lost: 5_000_000}
	for b.Loop() {
		p.SetOrder(order)
	}
}

// What the shim reads for an order: the module's word on the pause that is under way.
func BenchmarkNow(b *testing.B) {
	p, f := newPage(b)
	if _, err := f.WriteAt([]byte{2, 0, 0, 0, 1}, int64(offNow)); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := p.Now(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCounts(b *testing.B) {
	p, _ := newPage(b)
	for b.Loop() {
		p.Counts()
	}
}
