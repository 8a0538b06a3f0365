package e2e

import (
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
)

// The measure is a guest that was never paused. One that is paused a hundred times, and before that once after a run without a pause, stays
// with it, although CLOCK_MONOTONIC_RAW leaves both: by 5 us a second, twenty times what a real one does. FTCLOCK_TWIN
// sets another number of pauses, and a longer run.
func TestKVMATwinThatIsNeverPaused(t *testing.T) {
	count := check.Count(t, "FTCLOCK_TWIN", 100)
	const ppm = 5 // more would be more than the tolerance in a pause of 200 ms, which 5 ms become on a starved host
	rest := 60 * time.Second
	if count > 100 {
		rest = 200 * time.Second
	}
	x := managed("paused", clockElement)
	preloadFakeClock(t, x, "FAKECLOCK_RAW_PPM", ppm)
	d, clock := start(t, x)
	_, unpaused := domaintest.Start(t, conn, managed("twin", clockElement))
	apart := func() int64 { return offset(t, clock) - offset(t, unpaused) }

	pause(t, d, 5*time.Millisecond)
	before := apart()
	time.Sleep(rest)
	pause(t, d, 5*time.Millisecond)
	if moved := apart() - before; guest.Off(moved) {
		t.Errorf("the first pause after %v without one moved the guest's clock by %d ns", rest, -moved)
	} else {
		t.Logf("the first pause after %v moved the guest's clock by %d ns; by CLOCK_MONOTONIC_RAW it was %v off", rest, -moved, rest*ppm/1e6)
	}
	pauses(t, d, count, 5*time.Millisecond)
	moved := apart() - before
	s := status(t, d)
	t.Logf("%d pauses moved it by %d ns: %d dropped, %d anchored", count, -moved, s.Dropped, s.Anchored)
	if guest.Off(moved) {
		t.Errorf("%d pauses moved the guest's clock by %d ns", count, -moved)
	}
	if s.State != control.Correcting || s.Passed > 1 || s.Held != 0 || s.Reanchored != 0 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
}
