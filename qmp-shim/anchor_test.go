package shim

import (
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// Offsets in the page, of clockpage.h.
const (
	atCounts = 192
	atNow    = 320
	atAnchor = 384
	atRecord = 512

	outcomeOfRecord = 104 // in a record
)

// write puts 64-bit words into a page, as the module would.
func write(t *testing.T, f io.WriterAt, at int64, words ...uint64) {
	t.Helper()
	b, err := binary.Append(nil, binary.LittleEndian, words)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func testDomain(t testing.TB, clock string) *domain {
	t.Helper()
	return domainOf(t, memory{Clock: clock}, zerolog.Nop(), func(memory) {})
}

func domainOf(t testing.TB, m memory, log zerolog.Logger, save func(memory)) *domain {
	t.Helper()
	d, err := newDomain(log, m, save)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// warnings are what status has to say.
func warnings(d *domain) []string { return d.notes.read().Problems.Warnings }

const (
	byDefault = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`
	restoring = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="restore" do="catch-up"/></ftclock:clock>`
	holding   = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="migrate" do="hold"/></ftclock:clock>`
)

func TestAnchorIsReadFromTheModule(t *testing.T) {
	d := testDomain(t, byDefault)
	if _, err := d.readAnchor(); err == nil || !strings.Contains(err.Error(), "isn't loaded") {
		t.Errorf("without a page: %v", err)
	}
	f, page := newPage(t, clockpage.Minor)
	d.resume(page, true)
	if _, err := d.readAnchor(); err == nil || !strings.Contains(err.Error(), "next pause") {
		t.Errorf("without a pause: %v", err)
	}

	raw := now() - 100e9
	check := func(want, wantError uint64) {
		t.Helper()
		before := clock(unix.CLOCK_REALTIME)
		a, err := d.readAnchor()
		if err != nil {
			t.Fatal(err)
		}
		if a.Clock-want-(a.Raw-raw) > 0 || a.Error < wantError || a.Error > wantError+uint64(time.Second) {
			t.Errorf("the clock is %d, want %d; the error is %d, want at least %d", a.Clock, want+(a.Raw-raw), a.Error, wantError)
		}
		if a.Real < before || a.Real > before+uint64(time.Minute) || a.Boot == "" {
			t.Errorf("the host's clocks: %+v", a)
		}
	}
	// By its anchor of 100 s ago, and 7 ns of steering. Its own rate may have led it astray since.
	write(t, f, atAnchor, 1<<32, 1, 77e9, raw, 0, 0, 7, 40)
	write(t, f, atCounts, 300)
	check(77e9+7, 40+100*ownRate)

	// Where the module couldn't read it, it isn't known, though its frequency is.
	write(t, f, atAnchor, 1<<32, 1, 77e9, raw, 0, 0, 7, 40, 0, 0, 2_000_000)
	if a, err := d.readAnchor(); err != nil || a.KHz != 0 || a.TSC != 0 {
		t.Errorf("a TSC that isn't known is %d, %d kHz, %v", a.TSC, a.KHz, err)
	}
	// The guest's TSC goes on with its clock: 2 GHz, and 123 ticks at the anchor.
	write(t, f, atAnchor, 1<<32, 1, 77e9, raw, 0, 0, 7, 40, 0, 123, 2_000_000)
	if a, err := d.readAnchor(); err != nil || a.KHz != 2_000_000 || a.TSC != 123+2*(a.Clock-77e9) {
		t.Errorf("TSC %d after %d ns, %d kHz, %v", a.TSC, a.Clock-77e9, a.KHz, err)
	}

	// A page that lies can't make an anchor that nobody takes.
	write(t, f, atAnchor, 1<<32, 1, 1<<63, raw, 0, 0, 7, 40)
	if a, err := d.readAnchor(); err == nil {
		t.Errorf("read %+v", a)
	}
}

// What the host slept since the module's anchor belongs to the guest's clock.
func TestAnchorIsReadAfterASleep(t *testing.T) {
	module := clockpage.Anchor{Valid: 1, Clock: 77e9, Raw: 5e9, Steer: -3, Slept: 100e9}
	for _, c := range []struct{ slept, want uint64 }{{100e9, 79e9 - 3}, {100e9 + 5e6, 79e9 - 3}, {103e9, 82e9 - 3}, {0, 79e9 - 3}} {
		if got := readOn(module, instant{raw: 7e9, slept: c.slept}); got != c.want {
			t.Errorf("the host slept %d: %d, want %d", c.slept, got, c.want)
		}
	}
}

func TestAnchorIsImported(t *testing.T) {
	at := readInstant()
	kept := readHostClock()
	mine := metadata.Anchor{
		Clock: 77e9, Real: at.real - 3e9, Raw: at.raw - 2e9, Boot: host.BootID(), Slept: at.slept, Rate: 1500, Error: 40,
		HostError: 5000, Synchronised: true,
	}
	with := func(change func(*metadata.Anchor)) metadata.Anchor {
		a := mine
		change(&a)
		return a
	}
	byReal := clockpage.Import{Leg: clockpage.LegReal, Clock: 77e9, At: mine.Real, Rate: 1500, Error: 5040 + uint64(kept.MaximumError), Event: clockpage.Migrate, Any: 1}
	for name, c := range map[string]struct {
		clock   string
		minor   uint32
		anchor  metadata.Anchor
		want    clockpage.Import
		refused string
		warned  bool
	}{
		"of this boot": {byDefault, clockpage.Minor, mine,
			clockpage.Import{Leg: clockpage.LegRaw, Clock: 77e9, At: mine.Raw, Error: 40, Event: clockpage.Migrate, Any: 1}, "", false},
		"of another host":         {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Boot = "x" }), byReal, "", !kept.Synchronised},
		"of one that says no id":  {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Boot = "" }), byReal, "", !kept.Synchronised},
		"of before a sleep":       {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Slept += 20e6 }), byReal, "", !kept.Synchronised},
		"of an unkept clock":      {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Boot, a.Synchronised = "x", false }), byReal, "", true},
		"of one that isn't used":  {holding, clockpage.Minor, with(func(a *metadata.Anchor) { a.Boot, a.Synchronised = "x", false }), byReal, "", false},
		"that can't be":           {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Real = 0 }), clockpage.Import{}, "can't be", false},
		"into an older module":    {byDefault, 1, mine, clockpage.Import{}, "", false},
		"without its module":      {byDefault, 0, mine, clockpage.Import{}, "isn't loaded", false},
		"of a clock without time": {byDefault, clockpage.Minor, with(func(a *metadata.Anchor) { a.Clock = 1 << 63 }), clockpage.Import{}, "can't be", false},
	} {
		t.Run(name, func(t *testing.T) {
			d := testDomain(t, c.clock)
			_, page := newPage(t, c.minor)
			if c.minor != 0 {
				d.resume(page, true)
			}
			err := d.importAnchor(c.anchor, clockpage.Migrate)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("refused with %v, want %s", err, c.refused)
				}
				return
			} else if err != nil {
				t.Fatal(err)
			}
			got, err := page.Import()
			if err != nil || got.Leg != c.want.Leg || got.Clock != c.want.Clock || got.At != c.want.At || got.Rate != c.want.Rate || got.Event != c.want.Event || got.Any != c.want.Any ||
				got.Error < c.want.Error || got.Error > c.want.Error+uint64(time.Second) {
				t.Errorf("imported %+v, %v, want %+v", got, err, c.want)
			}
			said := warnings(d)
			if warned := len(said) == 1 && strings.Contains(said[0], "synchronised"); warned != c.warned {
				t.Errorf("warned: %q", said)
			}
		})
	}
}

// Which reading a state is carried on by, of those that there are.
func TestStateIsImported(t *testing.T) {
	at := readInstant()
	there := metadata.Anchor{Clock: 77e9, Real: at.real - 60e9, Boot: "x", Synchronised: true}
	// The guest of the anchor, saved 50 s later; and an earlier state of it, or another's.
	saved := lastStop{Saved: 127e9, Real: at.real - 10e9, Raw: at.raw - 10e9, Boot: host.BootID(), Slept: at.slept}
	stale := lastStop{Saved: 20e9, Real: at.real - 50e9, Raw: at.raw - 50e9, Boot: host.BootID(), Slept: at.slept}
	rebooted := lastStop{Saved: saved.Saved, Real: saved.Real, Raw: saved.Raw, Boot: "y", Slept: saved.Slept}
	// It ran here before it ran where the anchor is of.
	earlier := lastStop{Saved: 67e9, Real: there.Real - 10e9, Raw: at.raw - 70e9, Boot: host.BootID(), Slept: at.slept}
	// The host's clock was an hour ahead until the guest was saved, and set right since.
	setBack := lastStop{Saved: 127e9, Real: at.real + 3590e9, Raw: at.raw - 10e9, Boot: host.BootID(), Slept: at.slept}
	ahead := metadata.Anchor{Clock: 77e9, Real: at.real + 3540e9, Raw: at.raw - 60e9, Boot: host.BootID(), Slept: at.slept, Synchronised: true}
	// It was set between the anchor and the stop.
	stepped := ahead
	stepped.Real = at.real - 60e9
	const none = ^uint64(0)
	for name, c := range map[string]struct {
		clock, incoming string
		anchor          *metadata.Anchor
		stop            *lastStop
		at              uint64
		event           clockpage.Event
		any             uint32
		warning         string
	}{
		"a start":                             {restoring, "", nil, nil, none, 0, 0, ""},
		"a start with an old anchor":          {restoring, "", &there, nil, none, 0, 0, ""},
		"a snapshot, with an old anchor":      {restoring, "", &there, &stale, stale.Raw, clockpage.Restore, 0, ""},
		"a snapshot":                          {restoring, "", nil, &saved, saved.Raw, clockpage.Restore, 0, ""},
		"restored here":                       {restoring, control.Restored, &there, &saved, saved.Raw, clockpage.Restore, 1, ""},
		"restored here, after a reboot":       {restoring, control.Restored, &there, &rebooted, saved.Real, clockpage.Restore, 1, ""},
		"restored here, without an anchor":    {restoring, control.Restored, nil, &saved, saved.Raw, clockpage.Restore, 0, ""},
		"a snapshot, the clock set back":      {restoring, "", nil, &setBack, setBack.Raw, clockpage.Restore, 0, ""},
		"restored, the clock set back":        {restoring, control.Restored, &ahead, &setBack, setBack.Raw, clockpage.Restore, 1, ""},
		"restored, the clock set before":      {restoring, control.Restored, &stepped, &setBack, setBack.Raw, clockpage.Restore, 1, ""},
		"restored from an older image":        {restoring, control.Restored, &there, &stale, there.Real, clockpage.Restore, 1, ""},
		"restored from elsewhere":             {restoring, control.Restored, &there, nil, there.Real, clockpage.Restore, 1, ""},
		"restored from elsewhere, ran here":   {restoring, control.Restored, &there, &earlier, there.Real, clockpage.Restore, 1, ""},
		"restored from elsewhere, unknown":    {restoring, control.Restored, nil, nil, none, 0, 0, "nothing is known of its stop"},
		"restored from elsewhere, is held":    {byDefault, control.Restored, nil, nil, none, 0, 0, ""},
		"migrated":                            {byDefault, control.Migrated, &there, &saved, there.Real, clockpage.Migrate, 1, ""},
		"migrated without an anchor":          {byDefault, control.Migrated, nil, &saved, none, 0, 0, "no anchor came with it"},
		"migrated without an anchor, is held": {holding, control.Migrated, nil, nil, none, 0, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, page := newPage(t, clockpage.Minor)
			s := &shim{Config: Config{UUID: "u", LastStops: t.TempDir(), Incoming: c.incoming, Anchor: c.anchor, Log: zerolog.Nop()}, domain: testDomain(t, c.clock)}
			s.domain.resume(page, true)
			if c.stop != nil && s.writeLastStop(*c.stop) != nil {
				t.Fatal("the last stop isn't written")
			}
			s.importState()
			got, err := page.Import()
			if err != nil {
				got.At = none
			}
			if got.At != c.at || got.Event != c.event || got.Any != c.any {
				t.Errorf("imported %+v", got)
			}
			said := strings.Join(warnings(s.domain), "; ")
			if !readHostClock().Synchronised && strings.Contains(said, "this host's clock isn't synchronised") {
				said = ""
			}
			if (c.warning == "") != (said == "") || !strings.Contains(said, c.warning) {
				t.Errorf("warned %q", said)
			}
		})
	}
}

// What is kept of a stop for the guest's next process, where the host's clock is set or the host sleeps before QEMU ends.
func TestLastStopIsKept(t *testing.T) {
	at := readInstant()
	const left = 700 // the guest's clock is ahead of its anchor by so much, ns
	for name, c := range map[string]struct {
		anchored     bool
		step         int64  // of the host's clock since the stop
		slept        uint64 // what the host had slept at the stop, more than now
		boot, shifts bool   // its raw reading is kept; its real reading is of the host's clock as it is now
	}{
		"nothing happens":                  {true, 0, 0, true, false},
		"the clock is set ahead":           {true, 3600e9, 0, true, true},
		"the clock is set back":            {true, -3600e9, 0, true, true},
		"the host sleeps":                  {true, 0, 60e9, true, false}, // which its figure tells
		"nothing happens, without anchor":  {false, 0, 0, true, false},
		"the clock is set, without anchor": {false, 3600e9, 0, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			f, page := newPage(t, clockpage.Minor)
			s := &shim{Config: Config{UUID: "u", LastStops: t.TempDir(), Log: zerolog.Nop()}, domain: testDomain(t, restoring)}
			s.domain.resume(page, true)
			raw, real := at.raw-10e9, at.real-10e9-uint64(c.step)
			write(t, f, atNow, 1<<32, 1, 77e9, raw, real)
			want := lastStop{Saved: 77e9, Raw: raw, Real: real, Slept: at.slept}
			if c.anchored {
				write(t, f, atAnchor, 1<<32, 1, 77e9-left, raw, real, 0, 0, 40, at.slept+c.slept)
				want.Raw, want.Real, want.Slept = raw+left, real+left, at.slept+c.slept
			}
			if c.shifts {
				want.Real = at.real - 10e9 + left
			}
			s.keepLastStop()
			got := s.readLastStop()
			if got == nil {
				t.Fatal("nothing is kept")
			}
			if off := int64(got.Real - want.Real); off > int64(time.Second) || off < -int64(time.Second) {
				t.Errorf("real %d, %d off", got.Real, off)
			}
			if got.Saved != want.Saved || got.Raw != want.Raw || (got.Boot != "") != c.boot || !sameSleep(got.Slept, want.Slept) {
				t.Errorf("kept %+v, want %+v", *got, want)
			}
		})
	}
}

// A process that isn't libvirt's has no next one of its name: nothing is left of it that nobody would read nor remove.
func TestNoLastStopOfAProcess(t *testing.T) {
	f, page := newPage(t, clockpage.Minor)
	s := &shim{Config: Config{UUID: "pid-4711-99", LastStops: t.TempDir(), Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
	s.domain.resume(page, true)
	at := readInstant()
	write(t, f, atNow, 1<<32, 1, 77e9, at.raw, at.real)
	s.keepLastStop()
	if left, err := os.ReadDir(s.LastStops); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
}
