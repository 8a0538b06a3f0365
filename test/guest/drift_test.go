package guest

import "testing"

func TestOff(t *testing.T) {
	for drift, want := range map[int64]bool{0: false, MaxDrift: false, -MaxDrift: false, MaxDrift + 1: true, -MaxDrift - 1: true} {
		if Off(drift) != want {
			t.Errorf("%d ns are off: %v", drift, !want)
		}
	}
}
