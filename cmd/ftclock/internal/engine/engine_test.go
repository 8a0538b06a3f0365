package engine

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/control"
)

// fakePausable is a domain that is only a flag.
type fakePausable struct {
	paused, pauseFails, resumeFails bool
	suspends                        int
	suspended                       func() // called behind each, if there is one
}

func (f *fakePausable) Suspend() error {
	f.suspends++
	f.paused = true
	if f.pauseFails {
		return errors.New("the answer was lost")
	}
	if f.suspended != nil {
		f.suspended()
	}
	return nil
}

func (f *fakePausable) Resume() error {
	if f.resumeFails {
		return errors.New("connection lost")
	}
	f.paused = false
	return nil
}

func (f *fakePausable) GetState() (libvirt.DomainState, int, error) {
	if f.resumeFails {
		return 0, 0, errors.New("connection lost")
	}
	if f.paused {
		return libvirt.DOMAIN_PAUSED, 0, nil
	}
	return libvirt.DOMAIN_RUNNING, 0, nil
}

func TestDrive(t *testing.T) {
	f := &fakePausable{}
	e := &Engine{Domain: f}
	done := 0
	if err := e.Drive(t.Context(), 5*time.Millisecond, time.Millisecond, 10, func() { done++ }); err != nil {
		t.Fatal(err)
	}
	s := e.Sums
	if f.paused || done != 10 || f.suspends != 10 || s.Pauses != 10 {
		t.Errorf("done %d, suspends %d, %+v", done, f.suspends, s)
	}
	if s.Shortest < 10*time.Millisecond || s.Longest < s.Shortest {
		t.Errorf("sums %+v", s)
	}
}

func TestDriveInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := &fakePausable{suspended: cancel} // within the first pause
	if err := (&Engine{Domain: f}).Drive(ctx, 1000*time.Second, time.Minute, 10, func() {}); err != nil {
		t.Fatal(err)
	}
	if f.paused || f.suspends != 1 {
		t.Errorf("paused %t after %d pauses", f.paused, f.suspends)
	}
}

func TestPauseThatFailed(t *testing.T) {
	f := &fakePausable{pauseFails: true}
	e := &Engine{Domain: f}
	if err := e.Pause(t.Context(), time.Millisecond); err == nil || f.paused || e.Sums.Pauses != 0 {
		t.Errorf("paused %t, %v", f.paused, err)
	}
}

func TestResumeByOtherMeans(t *testing.T) {
	f := &fakePausable{resumeFails: true}
	e := &Engine{Domain: f, Resumer: func() error { f.paused = false; return nil }}
	err := e.Pause(t.Context(), time.Millisecond)
	if f.paused || err == nil || !strings.Contains(err.Error(), "second connection") {
		t.Errorf("paused %t, %v", f.paused, err)
	}
}

// readings are records of pauses of 20 ms, 70 ms apart, after each of which the guest's clock is off by so much more.
func readings(decision clockpage.Decision, off int64) *control.Status {
	s := &control.Status{State: control.Correcting, Clock: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`}
	for i := range int64(6) {
		s.Records = append(s.Records, clockpage.Record{
			Number: uint64(101 + i), Outcome: clockpage.Outcome{Decision: decision, Reason: clockpage.Bounds}, Lost: int64(20 * time.Millisecond), ResidualStop: 7 * i,
			StopRaw: uint64(1_000_000_000 + i*int64(70*time.Millisecond)), Saved: uint64(50_000_000 + i*(int64(70*time.Millisecond)+off)),
		})
	}
	return s
}

func TestVerdict(t *testing.T) {
	before := &control.Status{Counts: clockpage.Counts{Pauses: 100}}
	stock := readings(clockpage.Held, -int64(20*time.Millisecond))
	watching := readings(clockpage.Held, -int64(20*time.Millisecond))
	watching.State = control.Watching
	steered := readings(clockpage.Anchored, 3000)
	steered.Clock = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="utc"/>`
	unseen := readings(clockpage.Dropped, 0)
	for i := range unseen.Records[:5] {
		unseen.Records[i].StopRaw = 0
	}
	for name, c := range map[string]struct {
		after *control.Status
		off   int64
		fails bool
		why   string
	}{
		"right":                       {readings(clockpage.Dropped, 0), 0, false, ""},
		"at the limit":                {readings(clockpage.Dropped, 2000), 10_000, false, ""},
		"beyond it":                   {readings(clockpage.Dropped, 2001), 10_005, true, "the reason isn't known"},
		"behind":                      {readings(clockpage.Anchored, -2001), -10_005, true, "the reason isn't known"},
		"held":                        {stock, -int64(100 * time.Millisecond), true, "held: a value was out of bounds"},
		"watched":                     {watching, -int64(100 * time.Millisecond), true, "only watched"},
		"steered to UTC":              {steered, 35, false, ""},
		"one reading":                 {unseen, 0, false, "the module recorded 1 pause:"},
		"somebody else's, before all": {&control.Status{Records: []clockpage.Record{{Number: 99, StopRaw: 1}, {Number: 100, StopRaw: 2}}}, 0, false, "recorded 0 pauses"},
	} {
		v := Judge(before, c.after)
		if v.Off != c.off || v.Fails != c.fails || (c.why == "") != (v.Why == "") || !strings.Contains(v.Why, c.why) {
			t.Errorf("%s: %+v", name, v)
		}
		if c.why == "" && (v.Pauses != 5 || v.Lost != uint64(100*time.Millisecond)) {
			t.Errorf("%s: %d pauses, %d ns", name, v.Pauses, v.Lost)
		}
	}
}
