package main

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

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
	e := &engine{domain: f}
	done := 0
	c := &exerciseCmd{Rate: 200, Pause: 1, Count: 10}
	if err := c.drive(t.Context(), e, func() { done++ }); err != nil {
		t.Fatal(err)
	}
	s := e.sums
	if f.paused || done != 10 || f.suspends != 10 || s.pauses != 10 {
		t.Errorf("done %d, suspends %d, %+v", done, f.suspends, s)
	}
	if s.shortest < 10*time.Millisecond || s.longest < s.shortest {
		t.Errorf("sums %+v", s)
	}
}

func TestDriveInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := &fakePausable{suspended: cancel} // within the first pause
	c := &exerciseCmd{Rate: 0.001, Pause: 60_000, Count: 10}
	if err := c.drive(ctx, &engine{domain: f}, func() {}); err != nil {
		t.Fatal(err)
	}
	if f.paused || f.suspends != 1 {
		t.Errorf("paused %t after %d pauses", f.paused, f.suspends)
	}
}

func TestPauseThatFailed(t *testing.T) {
	f := &fakePausable{pauseFails: true}
	e := &engine{domain: f}
	if err := e.pause(t.Context(), time.Millisecond); err == nil || f.paused || e.sums.pauses != 0 {
		t.Errorf("paused %t, %v", f.paused, err)
	}
}

func TestResumeByOtherMeans(t *testing.T) {
	f := &fakePausable{resumeFails: true}
	e := &engine{domain: f, resumer: func() error { f.paused = false; return nil }}
	err := e.pause(t.Context(), time.Millisecond)
	if f.paused || err == nil || !strings.Contains(err.Error(), "second connection") {
		t.Errorf("paused %t, %v", f.paused, err)
	}
}

// A signal in the middle of a pause, and the whole program: the domain runs afterwards.
func TestSignal(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		_, d := holdMock(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, stderr, code := told("exercise", mockDomain, "--rate", "0.01", "--pause", "50000", "--count", "5")
			if code != exitError || !strings.Contains(stderr, "interrupted after 1 pause of 5, test is running") {
				t.Errorf("%v: exit code %d, %s", signal, code, stderr)
			}
		}()
		for {
			if state, _, err := d.GetState(); err != nil {
				t.Fatal(err)
			} else if state == libvirt.DOMAIN_PAUSED {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if err := syscall.Kill(syscall.Getpid(), signal); err != nil {
			t.Fatal(err)
		}
		<-ended
		if state, _, err := d.GetState(); err != nil || state != libvirt.DOMAIN_RUNNING {
			t.Errorf("%v: state %d (%v) afterwards", signal, state, err)
		}
	}
}

func TestCompare(t *testing.T) {
	before := control.Status{Pauses: 10, Dropped: 10, CaughtUp: 50e6, WorstResidual: 900}
	after := control.Status{
		State: control.Correcting, Pauses: 15, Dropped: 12, Anchored: 1, Held: 1, Passed: 1, OverLimit: 1, CaughtUp: 65e6,
		Disagreements: 1, LastDisagreement: "pause 14",
	}
	records := []control.Record{
		{Number: 11, Decision: "dropped", Lost: 5e6, ResidualStop: -30, Cost: 600},
		{Number: 12, Decision: "anchored", Lost: 5e6, ResidualStop: 20, Cost: 900},
		{Number: 13, Decision: "held", Lost: 11e9, Cost: 100},
		{Number: 14, Decision: "passed", Lost: 5e6, Cost: 700},
	}
	got := make(map[string]string)
	for _, line := range compare(before, after, records) {
		got[line[0]] = line[1]
	}
	for name, want := range map[string]string{
		"state":          "correcting",
		"pauses":         "5: 2 dropped, 1 anchored, 1 held, 1 passed",
		"caught up":      "15.0 ms",
		"lost":           "+11.00 s",
		"worst residual": "30 ns",
		"cost":           "median 700 ns, worst 900 ns",
		"not recorded":   "1 pause",
		"errors":         "1 passed in doubt, 1 over limit, 1 disagreements, pause 14",
	} {
		if got[name] != want {
			t.Errorf("%s: got %q, want %q", name, got[name], want)
		}
	}
}

// Records are taken once each, although every answer repeats the newest.
func TestWatcher(t *testing.T) {
	before := shims
	defer func() { shims = before }()
	shims = t.TempDir()
	f, err := startFakeShim(shims, control.Status{
		Name: "web", UUID: someUUID, Version: "fake", State: control.Correcting, Pauses: 1, Records: []control.Record{{Number: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.stop()
	w := newWatcher(someUUID, true)
	for n := uint64(2); n <= 5; n++ {
		f.mu.Lock()
		f.status.Pauses, f.status.Records = n, append(f.status.Records, control.Record{Number: n})
		f.mu.Unlock()
		if n != 3 {
			w.collect()
		}
	}
	var numbers []uint64
	for _, r := range w.records {
		numbers = append(numbers, r.Number)
	}
	if len(numbers) != 4 || numbers[0] != 2 || numbers[3] != 5 {
		t.Errorf("got the records %v, want 2 to 5", numbers)
	}
}
