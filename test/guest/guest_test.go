package guest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"
)

func TestCopy(t *testing.T) {
	path, err := Copy(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	elf, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The Multiboot specification wants the header in the first 8192 bytes, 32-bit aligned.
	at := strings.Index(string(elf[:min(len(elf), 8192)]), "\x02\xb0\xad\x1b")
	if at < 0 || at%4 != 0 {
		t.Errorf("multiboot header at %d", at)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o444 != 0o444 {
		t.Errorf("not everybody can read it: %v, %v", info, err)
	}
}

func TestRecordLayout(t *testing.T) {
	var r record
	asserts := "#include <stddef.h>\n#include \"guest.c\"\n" +
		fmt.Sprintf("_Static_assert(sizeof(struct record) == %d, \"size\");\n", unsafe.Sizeof(r))
	for field, offset := range map[string]uintptr{
		"magic": unsafe.Offsetof(r.Magic), "sequence": unsafe.Offsetof(r.Sequence),
		"clock": unsafe.Offsetof(r.Clock), "tsc": unsafe.Offsetof(r.TSC), "largest": unsafe.Offsetof(r.Largest),
		"backsteps": unsafe.Offsetof(r.Backsteps), "largest_backstep": unsafe.Offsetof(r.LargestBackstep),
		"largest_gap": unsafe.Offsetof(r.LargestGap), "largest_gap_at": unsafe.Offsetof(r.LargestGapAt),
		"loops": unsafe.Offsetof(r.Loops), "pvclock_flags": unsafe.Offsetof(r.PvclockFlags),
		"pvclock_version": unsafe.Offsetof(r.PvclockVersion), "pvclock_updates": unsafe.Offsetof(r.PvclockUpdates),
		"published": unsafe.Offsetof(r.Published),
	} {
		asserts += fmt.Sprintf("_Static_assert(offsetof(struct record, %s) == %d, %q);\n", field, offset, field)
	}
	var q request
	asserts += fmt.Sprintf("_Static_assert(sizeof(struct request) == %d && offsetof(struct request, what) == %d && offsetof(struct request, port) == %d &&"+
		" offsetof(struct request, value) == %d && offsetof(struct request, times) == %d && offsetof(struct request, done) == %d, \"request\");\n",
		unsafe.Sizeof(q), unsafe.Offsetof(q.What), unsafe.Offsetof(q.Port), unsafe.Offsetof(q.Value), unsafe.Offsetof(q.Times), unsafe.Offsetof(q.Done))
	asserts += fmt.Sprintf("_Static_assert(REQUEST_ADDRESS == %d && REQUEST_OUT8 == %d && REQUEST_OUT16 == %d && REQUEST_IN8 == %d &&"+
		" REQUEST_TRIPLE_FAULT == %d, \"requests\");\n", requestAddress, out8, out16, in8, tripleFault)
	asserts += fmt.Sprintf("_Static_assert(RECORD_ADDRESS == %d && RECORD_MAGIC == %d, \"constants\");\n", recordAddress, recordMagic)
	gcc := exec.Command("gcc", "-std=c11", "-m32", "-march=i386", "-mgeneral-regs-only", "-ffreestanding", "-fsyntax-only", "-Isrc", "-x", "c", "-")
	gcc.Stdin = strings.NewReader(asserts)
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestOffsets(t *testing.T) {
	const offset, tick = 1_000_000, 0.4 // ns, ns
	// sample is one at that time, in ns, published and seen so much later.
	sample := func(at, published, seen int64) Sample {
		return Sample{Clock: at - offset, Raw: at + published + seen, TSC: uint64(float64(at) / tick), Late: uint32(int64(float64(published) / tick))}
	}
	var steady, lastLate, firstLate, back []Sample
	for i := range int64(100) {
		steady = append(steady, sample(i*2_000_000, 50_000, 300+i))
	}
	lastLate = append(append(lastLate, steady[:99]...), sample(99*2_000_000, 50_000, 40_000_000))
	firstLate = append(append(firstLate, sample(0, 50_000, 40_000_000)), steady[1:]...)
	for i, s := range steady {
		if i >= 50 { // a state was loaded, and the TSC with it
			s.TSC -= steady[50].TSC
		}
		back = append(back, s)
	}
	for _, c := range []struct {
		name    string
		all     []Sample
		most    int64
		samples int
	}{
		{"steady", steady, 310, 100},
		{"the last look is late", lastLate, 310, 100},
		{"the first look is late", firstLate, 310, 100},
		{"the TSC goes back", back, 60_000, 100},
		{"one", steady[:1], 50_400, 1},
		{"published after a pause", []Sample{steady[0], sample(2_000_000, 5_000_000, 300), steady[2]}, 400, 3},
	} {
		got := offsets(c.all)
		if len(got) != c.samples || got[0] < offset || got[0] > offset+c.most {
			t.Errorf("%s: %d of %d samples is the least, want %d to %d", c.name, got[0], len(got), offset, offset+c.most)
		}
	}
	wrapped := sample(0, 5_000_000_000, 300) // more than the word holds
	if got := offsets([]Sample{wrapped, steady[99]}); got[len(got)-1] < offset+300 {
		t.Errorf("a word that wrapped gives %d", got[len(got)-1])
	}
}

func TestApart(t *testing.T) {
	const khz = 2_500_000 // 0.4 ns a tick
	for _, c := range []struct {
		a, b Reading
		want int64
	}{
		{Reading{Clock: 2_000_000, TSC: 5_000_000}, Reading{Clock: 1_000_000, TSC: 2_500_000}, 0},
		{Reading{Clock: 1_000_000, TSC: 2_500_000}, Reading{Clock: 2_000_000, TSC: 5_000_000}, 0},
		{Reading{Clock: 2_000_300, TSC: 5_000_000}, Reading{Clock: 1_000_000, TSC: 2_500_000}, 300},
		{Reading{Clock: 1_000_000, TSC: 2_500_000}, Reading{Clock: 2_000_300, TSC: 5_000_000}, -300},
		{Reading{Clock: 1_000_000, TSC: 10}, Reading{Clock: 999_996, TSC: 0}, 0},
	} {
		if got := apart(c.a, c.b, khz); got != c.want {
			t.Errorf("%+v is %d ns ahead of %+v, want %d", c.a, got, c.b, c.want)
		}
	}
}
