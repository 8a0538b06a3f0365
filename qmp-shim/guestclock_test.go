package shim

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

// looked is the module's section of the page behind what it saw (struct ftclock_clocks), at its place.
func looked(t *testing.T, f *os.File, on clockpage.Clock, without time.Duration) {
	t.Helper()
	var section bytes.Buffer
	for _, v := range []any{uint32(2), uint32(on), uint64(1), uint64(without)} {
		_ = binary.Write(&section, binary.LittleEndian, v)
	}
	if _, err := f.WriteAt(section.Bytes(), 33536); err != nil {
		t.Fatal(err)
	}
}

func TestGuestClock(t *testing.T) {
	f, page := newPage(t, clockpage.Minor)
	d := testDomain(t, byDefault)
	expect := func(what string, state control.State, clock control.GuestClock) {
		t.Helper()
		var s control.Status
		if d.status(&s, 0); s.State != state || s.GuestClock != clock {
			t.Errorf("%s: %s, %q; want %s, %q", what, s.State, s.GuestClock, state, clock)
		}
	}
	expect("no module", control.Starting, "")
	d.load = func(heard heard) { heard(page, "ptrace", nil) }
	if err := d.module.loadNow(); err != nil {
		t.Fatal(err)
	}
	expect("no pause yet", control.Correcting, control.ClockNotSeen)
	for what, c := range map[string]struct {
		on      clockpage.Clock
		without time.Duration
		state   control.State
		clock   control.GuestClock
	}{
		"kvmclock":               {clockpage.KVMClock, 0, control.Correcting, control.KVMClock},
		"Hyper-V":                {clockpage.HyperVPage | clockpage.HyperVCounter, 0, control.Correcting, control.HyperVPage},
		"Hyper-V by its counter": {clockpage.HyperVCounter, 0, control.Correcting, control.HyperVCounter},
		"firmware":               {0, control.UnkeptAfter - 1, control.Correcting, control.NoClockYet},
		"another clock":          {0, control.UnkeptAfter, control.Unkept, control.NoClock},
		"for ages":               {0, -1, control.Unkept, control.NoClock},
		"no answer":              {clockpage.ClockNotKnown, 0, control.Correcting, control.ClockNotKnown},
		"nonsense":               {0xffffffff, 0, control.Correcting, control.ClockNotKnown},
	} {
		looked(t, f, c.on, c.without)
		expect(what, c.state, c.clock)
	}
	d.setPolicy(nil)
	looked(t, f, 0, time.Hour)
	expect("watched", control.Watching, control.NoClock)
}

func TestGuestClockOfAnOldModule(t *testing.T) {
	_, page := newPage(t, 1)
	if clock, _ := guestClock(page); clock != control.ClockOldModule {
		t.Errorf("it is %q", clock)
	}
}
