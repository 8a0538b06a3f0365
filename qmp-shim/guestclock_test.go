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

// A clock whose pauses go through in doubt, and will, isn't corrected. One doubt, with an anchor again behind it, is past.
func TestPausesInDoubt(t *testing.T) {
	outcome := func(d clockpage.Decision, r clockpage.Reason, e clockpage.Event) uint64 {
		return uint64(d) | uint64(r)<<16 | uint64(e)<<32
	}
	right := outcome(clockpage.Dropped, clockpage.InTolerance, clockpage.Checkpoint)
	held := outcome(clockpage.Held, clockpage.ByThePolicy, clockpage.Suspend)
	unstable := outcome(clockpage.Passed, clockpage.Unstable, clockpage.Checkpoint)
	start := outcome(clockpage.Passed, clockpage.Unstable, clockpage.Start)
	for what, c := range map[string]struct {
		pauses   []uint64
		anchored uint64
		state    control.State
	}{
		"none yet":              {nil, 0, control.Correcting},
		"right":                 {[]uint64{right, right}, 1, control.Correcting},
		"the start":             {[]uint64{start}, 0, control.Correcting},
		"a doubt that is over":  {[]uint64{right, right, unstable}, 1, control.Correcting},
		"one that isn't":        {[]uint64{right, right, unstable}, 0, control.Uncorrected},
		"a single one":          {[]uint64{unstable}, 0, control.Uncorrected},
		"always another":        {[]uint64{right, unstable, unstable, unstable}, 1, control.Uncorrected},
		"now and then":          {[]uint64{unstable, unstable, right, unstable}, 1, control.Correcting},
		"an end of them":        {[]uint64{unstable, unstable, unstable, right}, 1, control.Correcting},
		"a hold without anchor": {[]uint64{unstable, unstable, held}, 0, control.Correcting},
	} {
		f, page := newPage(t, clockpage.Minor)
		d := testDomain(t, byDefault)
		d.load = func(heard heard) { heard(page, "ptrace", nil) }
		if err := d.module.loadNow(); err != nil {
			t.Fatal(err)
		}
		for i, pause := range c.pauses {
			at := int64(atRecord + i*clockpage.RecordSize)
			write(t, f, at, 2, uint64(i)+1)
			write(t, f, at+outcomeOfRecord, pause)
		}
		write(t, f, atCounts, uint64(len(c.pauses)))
		write(t, f, atAnchor, 2|c.anchored<<32)
		var s control.Status
		if d.status(&s, 0); s.State != c.state || (s.Why != "") != (c.state == control.Uncorrected) {
			t.Errorf("%s: %s, %q; want %s", what, s.State, s.Why, c.state)
		}
	}
}

func TestGuestClockOfAnOldModule(t *testing.T) {
	_, page := newPage(t, 1)
	if clock, _ := guestClock(page); clock != control.ClockOldModule {
		t.Errorf("it is %q", clock)
	}
}
