package status

import (
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
)

func TestSince(t *testing.T) {
	now := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	for _, test := range []struct {
		at   time.Time
		want string
	}{
		{time.Time{}, "-"},
		{now.Add(-time.Hour), "06:08:09"},
		{now.Add(-8 * time.Hour), "2024-05-05"},
		{now.Add(-time.Hour).In(time.FixedZone("elsewhere", 5*3600)), "06:08:09"},
	} {
		if got := since(test.at, now); got != test.want {
			t.Errorf("%v: got %q, want %q", test.at, got, test.want)
		}
	}
}

// longest is a domain whose every cell is as wide as it gets.
func longest() Entry {
	return Entry{Status: control.Status{
		Name: strings.Repeat("long-", 30), State: control.Uncorrected, Method: "preload",
		Counts: clockpage.Counts{Pauses: 1e12, CaughtUp: 599_123_456, WorstResidual: 123_456}, Since: time.Unix(1e9, 0), Records: []clockpage.Record{{ResidualStop: math.MinInt64}},
	}}
}

func TestTableFits(t *testing.T) {
	now := time.Now()
	for _, entries := range [][]Entry{nil, {longest()}, {longest(), {Mute: true, Status: control.Status{Name: "x", State: Off}}}} {
		var rows [][]string
		for _, e := range entries {
			rows = append(rows, statusRow(e, now))
		}
		for _, line := range ui.Table(statusColumns, rows) {
			if n := utf8.RuneCountInString(line); n > ui.TableWidth {
				t.Errorf("%d columns: %s", n, line)
			}
		}
	}
	record := clockpage.Record{
		Number: 1e12, Outcome: clockpage.Outcome{Event: clockpage.Checkpoint, Decision: clockpage.Anchored}, Lost: math.MinInt64, ResidualStop: math.MinInt64, Cost: math.MaxUint64,
		ContReal: 1 << 62,
	}
	for _, line := range ui.Table(RecordColumns, [][]string{RecordRow(record, time.UTC)}) {
		if n := utf8.RuneCountInString(line); n > ui.TableWidth {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

// What a shim says may have been written by somebody who took QEMU over.
func TestTerminalIsSafe(t *testing.T) {
	const evil = "\x1b[2Jx\ny\u202e"
	e := Entry{On: evil, Status: control.Status{
		Name: evil, UUID: evil, Why: evil, Method: evil, Clock: evil, Version: evil, Disagreements: 1, LastDisagreement: evil,
		Warnings: []string{evil}, State: control.Uncorrected,
		Records: []clockpage.Record{{Outcome: clockpage.Outcome{Event: 99, Decision: 99, Reason: 99}, ContReal: math.MaxUint64}},
	}}
	var out strings.Builder
	u := &ui.UI{Stdout: &out}
	PrintTable(u, []Entry{e}, true)
	PrintDetails(u, e, true)
	PrintRecords(u, e, true)
	for _, c := range []string{"\x1b", "x\ny", "\u202e"} {
		if strings.Contains(out.String(), c) {
			t.Errorf("%q got through:\n%s", c, out.String())
		}
	}
}

func TestColour(t *testing.T) {
	e := Entry{Status: control.Status{Name: "correcting  correcting  x", State: control.Correcting}}
	var out strings.Builder
	PrintTable(&ui.UI{Stdout: &out, Colour: true}, []Entry{e}, false)
	if want := "correcting correcting x  \x1b[32mcorrecting\x1b[0m  -"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in %q", want, out.String())
	}
}

func TestBad(t *testing.T) {
	for state, want := range map[control.State]bool{
		control.Starting: false, control.Correcting: false, control.Watching: true, control.Uncorrected: true, control.Unkept: true,
		Off: false, Pending: true, Disabled: false, Unmanaged: true, Gone: true, Unknown: true, Unreachable: true,
	} {
		if got := (Entry{Status: control.Status{State: state}}).Bad(); got != want {
			t.Errorf("%s: got %t, want %t", state, got, want)
		}
	}
	if !(Entry{Status: control.Status{State: control.Correcting, Disagreements: 1}}).Bad() {
		t.Error("a disagreement isn't bad")
	}
}

// What went through uncorrected is part of what was lost.
func TestPassedPausesAreLost(t *testing.T) {
	e := Entry{Status: control.Status{Counts: clockpage.Counts{Passed: 2, CaughtUp: 5e9, HeldTime: 3e9, PassedTime: 2e9}}}
	lines := map[string]string{}
	for _, l := range Details(e, "") {
		lines[l[0]] = l[1]
	}
	for name, want := range map[string]string{"lost in all": "10.00 s", "held in all": "3.00 s", "passed in all": "2.00 s"} {
		if lines[name] != want {
			t.Errorf("%s: %q, not %q", name, lines[name], want)
		}
	}
	e.PassedTime = 0
	for _, l := range Details(e, "") {
		if l[0] == "passed in all" {
			t.Errorf("%q, where nothing was", l)
		}
	}
}
