package e2e

import (
	"testing"
	"time"

	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

// Without ftclock a pause is lost to the guest. Were it not, no other test
// here would prove anything.
func TestKVMStockLosesPauses(t *testing.T) {
	d, clock := start(t, privatelibvirt.GuestXML("stock", elf))
	before := offset(t, clock)

	first := guest.Raw()
	time.Sleep(3 * time.Second)
	unpaused := offset(t, clock) - before
	elapsed := guest.Raw() - first
	t.Logf("without a pause: drift %d ns in %.1f s", unpaused, float64(elapsed)/1e9)
	// kvmclock and CLOCK_MONOTONIC_RAW may differ in rate by 230 ns a second.
	if unpaused < -10_000 || unpaused > 10_000 {
		t.Errorf("guest without a pause drifted by %d ns, more than 10 microseconds", unpaused)
	}

	before = offset(t, clock)
	const pauses = 100
	for range pauses {
		if err := d.Suspend(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
		if err := d.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	lost := offset(t, clock) - before
	t.Logf("%d pauses of 5 ms: lost %.1f ms", pauses, float64(lost)/1e6)
	if lost < 400e6 {
		t.Errorf("guest lost only %d ns of %d pauses: the measuring doesn't work, or something corrects the clock", lost, pauses)
	}
	count, largest, err := clock.Backsteps()
	if err != nil || count != 0 {
		t.Errorf("guest's clock went back %d times, by up to %d ns: %v", count, largest, err)
	}
}
