package e2e

import (
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/domaintest"
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
	check.Within(t, unpaused, maxDrift, "the guest drifted without a pause")

	before = offset(t, clock)
	const count = 100
	pauses(t, d, count, 5*time.Millisecond)
	lost := offset(t, clock) - before
	t.Logf("%d pauses of 5 ms: lost %.1f ms", count, float64(lost)/1e6)
	if lost < 400e6 {
		t.Errorf("guest lost only %d ns of %d pauses: the measuring doesn't work, or something corrects the clock", lost, count)
	}
	domaintest.NoBacksteps(t, clock)
}
