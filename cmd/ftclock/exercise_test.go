package main

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
)

// A signal in the middle of a pause, and the whole program: the domain runs afterwards.
func TestSignal(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		_, d := holdMock(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, stderr, code := told("exercise", mockDomain, "--rate", "0.01", "--pause", "50000", "--count", "5")
			if code != ui.ExitError || !strings.Contains(stderr, "interrupted after 1 pause of 5, test is running") {
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
	before := control.Status{Counts: clockpage.Counts{Pauses: 10, Dropped: 10, CaughtUp: 50e6, WorstResidual: 900}}
	after := control.Status{
		State:         control.Correcting,
		Counts:        clockpage.Counts{Pauses: 15, Dropped: 12, Anchored: 1, Held: 1, Passed: 1, OverLimit: 1, CaughtUp: 65e6},
		Disagreements: 1, LastDisagreement: "pause 14",
	}
	records := []clockpage.Record{
		{Number: 11, Outcome: clockpage.Outcome{Decision: clockpage.Dropped}, Lost: 5e6, ResidualStop: -30, Cost: 600},
		{Number: 12, Outcome: clockpage.Outcome{Decision: clockpage.Anchored}, Lost: 5e6, ResidualStop: 20, Cost: 900},
		{Number: 13, Outcome: clockpage.Outcome{Decision: clockpage.Held}, Lost: 11e9, Cost: 100},
		{Number: 14, Outcome: clockpage.Outcome{Decision: clockpage.Passed}, Lost: 5e6, Cost: 700},
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
	at := status.Dirs{Shims: t.TempDir()}
	f, err := fakeshim.Start(at.Shims, control.Status{
		Name: "web", UUID: fakeshim.UUID, Version: "fake", State: control.Correcting, Counts: clockpage.Counts{Pauses: 1}, Records: []clockpage.Record{{Number: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()
	w := newWatcher(at, fakeshim.UUID, true)
	for n := uint64(2); n <= 5; n++ {
		f.Say(func(s *control.Status) { s.Pauses, s.Records = n, append(s.Records, clockpage.Record{Number: n}) })
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
