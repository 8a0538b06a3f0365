package shim

import (
	"fmt"
	"sync"
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
	notes *notebook

	mu             sync.Mutex
	asked          uint64 // CLOCK_MONOTONIC_RAW, ns; 0: never
	unsynchronised bool
	givenUp        uint64 // clockpage.Follow.GivenUp
}

// check asks how good the host's clock is, if the answer is old, and tells the module, where a policy has the guest follow UTC; that
// goes on following while it isn't synchronised: the kernel keeps the last frequency, which is no worse than none.
func (h *hostSync) check(policy *metadata.Policy, page *clockpage.Page, t uint64) {
	if policy == nil || policy.Reference != metadata.UTC {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asked != 0 && t-h.asked < uint64(syncAge) {
		return
	}
	h.asked = t
	kept, err := hostClock()
	if err != nil {
		h.notes.warn("asking how good the host's clock is: " + err.Error() + "; the guest follows it all the same: `chronyc tracking` tells")
		return
	}
	bound, unsynchronised := time.Duration(kept.MaximumError), !kept.Synchronised
	known := clockpage.Host{AtRaw: t, Error: uint64(kept.MaximumError)}
	if !unsynchronised {
		known.Synchronised = 1
	}
	page.SetHost(known)
	if f, err := page.Follow(); err == nil && f.GivenUp != h.givenUp {
		h.givenUp = f.GivenUp
		h.notes.warn(fmt.Sprintf("the host's clock was set by %v, or the guest was as far off it: the guest doesn't follow, and stays as far off UTC: set its clock, or restart it",
			time.Duration(f.LastGiven)))
	}
	if unsynchronised == h.unsynchronised {
		return
	}
	h.unsynchronised = unsynchronised
	if !unsynchronised {
		h.notes.log.Info().Dur("bound_ms", bound).Msg("the host's clock is synchronised")
		return
	}
	how := fmt.Sprintf("it may be off UTC by %v", bound)
	if bound >= kernelBound {
		how = "nobody knows by how much it is off UTC"
	}
	h.notes.warn("the host's clock isn't synchronised, and the guest follows it: " + how + "; look after chrony, or what else keeps it")
}
