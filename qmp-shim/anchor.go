package shim

import (
	"errors"
	"fmt"
	"math/bits"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/kvmclock"
	metadata "ftclock/xml-templates"
)

/*
A guest's clock has to go on where the guest does: in another process after virsh restore, on another host after a
migration, on the backup after a failover. What goes before it is an anchor, a reading of the guest's clock with the
host's clocks of the same instant. It needn't be of the stop, which nobody could send ahead: while the guest ran, its
clock ran with CLOCK_MONOTONIC_RAW, so that any earlier reading says what it read at any later time.

Between two processes of one host, as long as it isn't booted anew, CLOCK_MONOTONIC_RAW carries the reading on, to
microseconds. Between two hosts CLOCK_REALTIME does, as well as the two agree.
*/

// What kvmclock leaves CLOCK_MONOTONIC_RAW by, in ns a second: at most, and beyond kvmclock.Drift where the TSC's frequency is known.
// The latter doesn't hold over an update of KVM's master clock, as by a vCPU that is plugged in.
const (
	ownRate   = 300
	knownRate = 1
)

// sleptSlack is what two figures of the host's sleep may differ by: they are differences of readings made one after the
// other.
const sleptSlack = 10 * time.Millisecond

// instant is the host's clocks at one time, ns.
type instant struct {
	raw, real uint64
	slept     uint64
	error     uint64 // bound of what raw and real may be apart
}

// clock reads one of the kernel's clocks, ns; like all that the relay does for a message, without telling the scheduler.
func clock(id int32) uint64 {
	var t unix.Timespec
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		return 0 // no Linux that runs KVM refuses it; 0 means "not seen"
	}
	return uint64(t.Nano())
}

// readInstant reads the host's clocks; of several attempts the one that took least time counts.
func readInstant() instant {
	best := instant{error: 1 << 62}
	for range 5 {
		before := clock(unix.CLOCK_MONOTONIC_RAW)
		real := clock(unix.CLOCK_REALTIME)
		after := clock(unix.CLOCK_MONOTONIC_RAW)
		if half := (after - before) / 2; half < best.error {
			best = instant{raw: before + half, real: real, error: half + 1}
		}
	}
	mono := clock(unix.CLOCK_MONOTONIC)
	if boot := clock(unix.CLOCK_BOOTTIME); boot > mono {
		best.slept = boot - mono
	}
	return best
}

// hostClock asks the kernel how good the host's clock is; tests ask somebody else.
var hostClock = host.ReadClock

// readHostClock is hostClock, where what can't be asked isn't synchronised.
func readHostClock() host.Clock {
	c, err := hostClock()
	if err != nil {
		return host.Clock{MaximumError: int64(time.Second)}
	}
	return c
}

// here says whether an anchor's raw reading is good on this host now.
func here(boot string, slept uint64, at instant) bool {
	return boot != "" && boot == host.BootID() && sameSleep(slept, at.slept)
}

// sameSleep says whether the host didn't sleep between two times at which it had slept for so long.
func sameSleep(a, b uint64) bool {
	const slack = uint64(sleptSlack)
	return a < b+slack && b < a+slack
}

var errNotLoaded = errors.New("the module isn't loaded: `ftclock status` says why")

// readAnchor gives what the guest's clock reads now, or will when its pause has been caught up.
func (d *domain) readAnchor() (metadata.Anchor, error) {
	page := d.view().page
	if page == nil {
		return metadata.Anchor{}, errNotLoaded
	}
	module, err := page.Anchor()
	if err != nil {
		return metadata.Anchor{}, err
	}
	at, kept := readInstant(), readHostClock()
	a := metadata.Anchor{
		Real: at.real, Raw: at.raw, Boot: host.BootID(), Slept: at.slept,
		Rate: kept.Rate, HostError: uint64(kept.MaximumError), Synchronised: kept.Synchronised,
	}
	if module.Valid != 1 {
		return metadata.Anchor{}, errors.New("its clock hasn't been read yet: the next pause does that, however short")
	}
	a.Clock = readOn(module, at)
	a.Error = module.Error + at.error + (at.raw-module.Raw)/1e9*ownRate
	if module.KHz != 0 {
		if kvmclock.OnTSC() {
			drift := int64(float64(at.raw-module.Raw) * kvmclock.Drift(module.KHz))
			a.Clock += uint64(drift)
			a.Error = module.Error + at.error + (at.raw-module.Raw)/1e9*knownRate
		}
		if module.TSC != 0 {
			a.KHz = uint64(module.KHz)
			a.TSC = module.TSC + ticks(a.Clock-module.Clock, module.KHz)
		}
	}
	return a, a.Check()
}

// readOn is what the guest's clock reads now, by the module's anchor. It counts what the host sleeps, which CLOCK_MONOTONIC_RAW
// doesn't.
func readOn(module clockpage.Anchor, at instant) uint64 {
	clock := module.Clock + (at.raw - module.Raw) + uint64(module.Steer)
	if at.slept > module.Slept+uint64(sleptSlack) {
		clock += at.slept - module.Slept
	}
	return clock
}

// ticks is how many ticks a TSC makes in so many ns of kvmclock, which the kernel makes of it by its whole kHz.
func ticks(ns uint64, khz uint32) uint64 {
	high, low := bits.Mul64(ns, uint64(khz))
	n, _ := bits.Div64(high%1e6, low, 1e6)
	return n
}

// importAnchor gives the module the anchor of a state that is going to be loaded, or was given to a QEMU that waits for it.
func (d *domain) importAnchor(a metadata.Anchor, event clockpage.Event) error {
	if err := a.Check(); err != nil {
		return err
	}
	at, kept := readInstant(), readHostClock()
	v := clockpage.Import{Clock: a.Clock, Event: event, Any: 1, Error: a.Error + at.error, TSC: a.TSC, KHz: uint32(a.KHz)}
	if here(a.Boot, a.Slept, at) {
		v.Leg, v.At = clockpage.LegRaw, a.Raw
	} else {
		v.Leg, v.At, v.Rate = clockpage.LegReal, a.Real, a.Rate
		v.Error += a.HostError + uint64(kept.MaximumError)
	}
	policy, err := d.setImport(v, false)
	if err != nil {
		return err
	}
	d.log.Info().Stringer("event", event).Stringer("by", v.Leg).Uint64("error_ns", v.Error).Msg("anchor of an earlier process taken over")
	if v.Leg == clockpage.LegReal && !(a.Synchronised && kept.Synchronised) && catchesUp(policy, event) {
		which := "this host's clock isn't"
		if kept.Synchronised {
			which = "the clock of the host that it comes from isn't"
		} else if !a.Synchronised {
			which = "neither host's clock is"
		}
		d.notes.warn(fmt.Sprintf("the guest's clock goes on by CLOCK_REALTIME, but %s synchronised: it may be off by more than %v; run chrony on both hosts",
			which, time.Duration(v.Error)))
	}
	return nil
}

// setImport gives the module what a state is caught up from, only if it is the one of the last stop where onlyThat says so. It gives
// the policy.
func (d *domain) setImport(v clockpage.Import, onlyThat bool) (*metadata.Policy, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.page == nil {
		return nil, errNotLoaded
	}
	d.page.SetImport(v)
	d.onlyThat = onlyThat
	return d.policy, nil
}

// catchesUp says whether a state that is loaded is to be caught up.
func catchesUp(p *metadata.Policy, event clockpage.Event) bool {
	switch {
	case p == nil:
		return false
	case event == clockpage.Migrate:
		return p.Migrate.Do == metadata.CatchUp
	}
	return p.Restore.Do == metadata.CatchUp
}

// cantCatchUp says why the time of a migration or a restore isn't caught up, if it was to be.
func (d *domain) cantCatchUp(incoming string, err error) {
	event := clockpage.Restore
	if incoming == control.Migrated {
		event = clockpage.Migrate
	}
	if catchesUp(d.view().policy, event) {
		d.notes.warn("the time that the guest was away isn't caught up: " + err.Error() + "; what it lost stays lost, `ftclock status --records 256` has it")
	}
}
