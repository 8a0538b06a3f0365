package e2e

import (
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// portACPI is the control register of the PIIX4's power management where SeaBIOS puts it; powerOff is S5.
const (
	portACPI = 0x604
	powerOff = 0x2000
)

// resettable is a domain with what ends a guest's run.
func resettable(name, clock, onCrash string) *libvirtxml.Domain {
	x := managed(name, clock)
	privatelibvirt.ACPI(x)
	x.OnCrash = onCrash
	x.Devices.Panics = []libvirtxml.DomainPanic{{Model: "isa"}}
	return x
}

// rebooted has the guest boot again by what do does, and waits until it runs.
func rebooted(t *testing.T, clock *guest.Clock, do func()) {
	t.Helper()
	before := check.Value(clock.Steady())(t)
	do()
	check.Await(t, time.Minute, 20*time.Millisecond, func() bool {
		r, err := clock.Read()
		return err == nil && r.Loops < before.Loops
	}, "the guest's next boot")
	check.NoError(t, clock.WaitMoving(time.Minute))
}

// The host's side of kvmclock goes on over a reset, whoever makes it: nothing is lost, nothing corrected, and the anchor
// stays good for the checkpoints after it.
func TestKVMAResetLeavesTheClockAlone(t *testing.T) {
	d, clock := start(t, resettable("reset", clockElement, "restart"))
	hands := handsOf(t, d)
	pause(t, d, 5*time.Millisecond) // takes the anchor
	for _, c := range []struct {
		name, policy string
		reset        func(t *testing.T)
		pauses       uint64 // that it takes
	}{
		{"virsh reset", clockElement, func(t *testing.T) {
			mustVirsh(t, "reset", "reset")
		}, 0},
		{"triple fault", rules[1].clock, func(*testing.T) { hands.TripleFault() }, 0},
		{"keyboard controller", clockElement, func(*testing.T) { hands.LastOut8(0x64, 0xfe) }, 0},
		{"in a pause", clockElement, func(t *testing.T) {
			for _, do := range []func() error{d.Suspend, func() error { return d.Reset(0) }, d.Resume} {
				check.NoError(t, do())
			}
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			setPolicy(t, d, c.policy)
			before, s0 := offset(t, clock), status(t, d)
			rebooted(t, clock, func() { c.reset(t) })
			s := status(t, d)
			if s.Pauses != s0.Pauses+c.pauses || s.Anchor.Epoch != s0.Anchor.Epoch || (c.pauses == 0) != (s.Anchor.Clock == s0.Anchor.Clock) || s.Anchor.Valid != 1 {
				t.Errorf("status before %+v\nstatus after %+v", withoutRecords(s0), withoutRecords(s))
			}
			lostAsRecorded(t, clock, before, nil)
			setPolicy(t, d, clockElement)
			pauses(t, d, 20, 5*time.Millisecond)
			lostAsRecorded(t, clock, before, nil)
			if s := status(t, d); s.Held != 0 || s.Reanchored != 0 || s.Disagreements != 0 || len(s.Warnings) != 0 {
				t.Errorf("status: %+v", withoutRecords(s))
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// libvirt reboots a guest that has switched itself off, or has crashed, by a reset and a cont: that pause is one like any other.
func TestKVMAReboot(t *testing.T) {
	reboot := func(t *testing.T, d *privatelibvirt.Domain, hands *guest.Hands) {
		// The guest doesn't hear the power button, but libvirt notes what it is to do next.
		check.NoError(t, d.Reboot(libvirt.DOMAIN_REBOOT_ACPI_POWER_BTN))
		hands.LastOut16(portACPI, powerOff, 1)
	}
	crash := func(_ *testing.T, _ *privatelibvirt.Domain, hands *guest.Hands) { hands.LastOut8(portPanic, 1) }
	d, clock := start(t, resettable("reboot", clockElement, "restart"))
	hands := handsOf(t, d)
	pause(t, d, 5*time.Millisecond) // takes the anchor
	for _, c := range []struct {
		name   string
		reboot func(*testing.T, *privatelibvirt.Domain, *guest.Hands)
		rule   rule
	}{
		{"virsh reboot", reboot, rules[0]},
		{"virsh reboot, checkpoints are held", reboot, rules[1]},
		{"panic", crash, rules[0]},
		{"panic, checkpoints are held", crash, rules[1]},
	} {
		t.Run(c.name, func(t *testing.T) {
			setPolicy(t, d, c.rule.clock)
			before, s0 := offset(t, clock), status(t, d)
			rebooted(t, clock, func() { c.reboot(t, d, hands) })
			awaitState(t, d, libvirt.DOMAIN_RUNNING)
			s := status(t, d)
			if s.Pauses != s0.Pauses+1 || s.Anchor.Epoch != s0.Anchor.Epoch || s.Anchor.Valid != 1 || s.Disagreements != 0 || len(s.Warnings) != 0 {
				t.Fatalf("status before %+v\nstatus after %+v", withoutRecords(s0), withoutRecords(s))
			}
			r := s.Records[len(s.Records)-1]
			lost := lostAsRecorded(t, clock, before, s.Records[len(s.Records)-1:])
			t.Logf("%s, %s: %s; %v lost of %v", r.Event, r.Decision, r.Reason, time.Duration(lost), time.Duration(r.Lost))
			if held := r.Decision == clockpage.Held; held == c.rule.caughtUp || r.Ordered != 1 || r.Event != c.rule.event {
				t.Errorf("record: %+v", r)
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// A guest that was shut down begins with a new clock and a new anchor. What an earlier run read is nothing to go on
// from, not even where a restore would be caught up.
func TestKVMShutdownAndStart(t *testing.T) {
	for _, c := range []struct{ name, clock string }{
		{"default", clockElement},
		{"restores are caught up", clockWith(`<ftclock:on event="restore" do="catch-up"/>`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, resettable("shutdown", c.clock, "destroy"))
			pause(t, d, 5*time.Millisecond)
			clock.Close()
			handsOf(t, d).LastOut16(portACPI, powerOff, 1)
			awaitState(t, d, libvirt.DOMAIN_SHUTOFF)
			nothingLeft(t)
			startsAnew(t, d)
			if c.clock == clockElement {
				return
			}
			handsOf(t, d).LastOut8(portPanic, 1)
			awaitState(t, d, libvirt.DOMAIN_SHUTOFF)
			nothingLeft(t)
			startsAnew(t, d)
		})
	}
}

// startsAnew starts a domain whose guest was up for seconds, and checks that its clock begins at zero.
func startsAnew(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	begin := guest.Raw()
	clock := domaintest.StartClock(t, d)
	pauses(t, d, 20, 5*time.Millisecond)
	if o := offset(t, clock); o < begin {
		t.Errorf("the guest's clock began %v before the guest", time.Duration(begin-o))
	}
	s := status(t, d)
	if s.Anchor.Epoch != 1 || s.Dropped+s.Anchored != 20 || s.Passed != 1 || s.Held != 0 || s.Disagreements != 0 || len(s.Warnings) != 0 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	if r := s.Records[0]; r.Event != clockpage.Start || r.Decision != clockpage.Passed || r.Reason != clockpage.First {
		t.Errorf("the first record: %+v", r)
	}
	domaintest.NoBacksteps(t, clock)
}
