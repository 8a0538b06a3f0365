package shim

import (
	"fmt"
	"time"

	"ftclock/clockpage"
	metadata "ftclock/xml-templates"
)

// syncAge is how old an answer of adjtimex may be at a cont. It is asked again only then: where nothing passes, nothing
// wakes up.
const syncAge = 16 * time.Second

// kernelBound is adjtimex's maxerror from which the kernel itself calls the clock unsynchronised (NTP_PHASE_LIMIT of
// the kernel's include/linux/timex.h).
const kernelBound = 16 * time.Second

// hostSync is what was known last of how good the host's clock is.
type hostSync struct {
	asked          uint64 // CLOCK_MONOTONIC_RAW, ns; 0: never
	unsynchronised bool
	givenUp        uint64 // clockpage.Follow.GivenUp
}

// checkHost asks how good the host's clock is, if the answer is old, and tells the module; a guest that follows UTC goes
// on following while it isn't synchronised: the kernel keeps the last frequency, which is no worse than none. The caller
// holds d.mu, and d.page isn't nil.
func (d *domain) checkHost(t uint64) {
	if d.policy == nil || d.policy.Reference != metadata.UTC {
		return
	}
	if d.host.asked != 0 && t-d.host.asked < uint64(syncAge) {
		return
	}
	d.host.asked = t
	kept, err := hostClock()
	if err != nil {
		d.warn("asking how good the host's clock is: " + err.Error() + "; the guest follows it all the same: `chronyc tracking` tells")
		return
	}
	bound, unsynchronised := time.Duration(kept.MaximumError), !kept.Synchronised
	known := clockpage.Host{AtRaw: t, Error: uint64(kept.MaximumError)}
	if !unsynchronised {
		known.Synchronised = 1
	}
	d.page.SetHost(known)
	if f, err := d.page.Follow(); err == nil && f.GivenUp != d.host.givenUp {
		d.host.givenUp = f.GivenUp
		d.warn(fmt.Sprintf("the host's clock was set by %v, or the guest was as far off it: the guest doesn't follow, and stays as far off UTC: set its clock, or restart it",
			time.Duration(f.LastGiven)))
	}
	if unsynchronised == d.host.unsynchronised {
		return
	}
	d.host.unsynchronised = unsynchronised
	if !unsynchronised {
		d.log.Info().Dur("bound_ms", bound).Msg("the host's clock is synchronised")
		return
	}
	how := fmt.Sprintf("it may be off UTC by %v", bound)
	if bound >= kernelBound {
		how = "nobody knows by how much it is off UTC"
	}
	d.warn("the host's clock isn't synchronised, and the guest follows it: " + how + "; look after chrony, or what else keeps it")
}
