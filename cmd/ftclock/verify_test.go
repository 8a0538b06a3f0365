package main

import (
	"strings"
	"testing"
	"time"

	"ftclock/control"
)

// readings are records of pauses of 20 ms, 70 ms apart, after each of which the guest's clock is off by so much more.
func readings(decision string, off int64) *control.Status {
	s := &control.Status{State: control.Correcting, Clock: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`}
	for i := range int64(6) {
		s.Records = append(s.Records, control.Record{
			Number: uint64(101 + i), Decision: decision, Reason: "because", Lost: int64(20 * time.Millisecond), ResidualStop: 7 * i,
			StopRaw: uint64(1_000_000_000 + i*int64(70*time.Millisecond)), Saved: uint64(50_000_000 + i*(int64(70*time.Millisecond)+off)),
		})
	}
	return s
}

func TestVerdict(t *testing.T) {
	before := &control.Status{Pauses: 100}
	stock := readings("held", -int64(20*time.Millisecond))
	watching := readings("held", -int64(20*time.Millisecond))
	watching.State = control.Watching
	steered := readings("anchored", 3000)
	steered.Clock = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="utc"/>`
	unseen := readings("dropped", 0)
	for i := range unseen.Records[:5] {
		unseen.Records[i].StopRaw = 0
	}
	for name, c := range map[string]struct {
		after *control.Status
		off   int64
		fails bool
		why   string
	}{
		"right":                       {readings("dropped", 0), 0, false, ""},
		"at the limit":                {readings("dropped", 2000), 10_000, false, ""},
		"beyond it":                   {readings("dropped", 2001), 10_005, true, "the reason isn't known"},
		"behind":                      {readings("anchored", -2001), -10_005, true, "the reason isn't known"},
		"held":                        {stock, -int64(100 * time.Millisecond), true, "held: because"},
		"watched":                     {watching, -int64(100 * time.Millisecond), true, "only watched"},
		"steered to UTC":              {steered, 35, false, ""},
		"one reading":                 {unseen, 0, false, "the module recorded 1 pause:"},
		"somebody else's, before all": {&control.Status{Records: []control.Record{{Number: 99, StopRaw: 1}, {Number: 100, StopRaw: 2}}}, 0, false, "recorded 0 pauses"},
	} {
		v := judge(before, c.after)
		if v.off != c.off || v.fails != c.fails || (c.why == "") != (v.why == "") || !strings.Contains(v.why, c.why) {
			t.Errorf("%s: %+v", name, v)
		}
		if c.why == "" && (v.pauses != 5 || v.lost != uint64(100*time.Millisecond)) {
			t.Errorf("%s: %d pauses, %d ns", name, v.pauses, v.lost)
		}
	}
}

// verify names the clock that it speaks for, and speaks for no other.
func TestKeptClock(t *testing.T) {
	for clock, want := range map[control.GuestClock]string{
		control.KVMClock: "kvmclock", control.HyperVPage: "Hyper-V's reference time", control.HyperVCounter: "Hyper-V's reference time",
		control.NoClock: "", control.NoClockYet: "", control.ClockNotSeen: "", control.ClockNotKnown: "", control.ClockOldModule: "", "": "",
	} {
		if got, err := keptClock(clock); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", clock, got, err)
		}
	}
}
