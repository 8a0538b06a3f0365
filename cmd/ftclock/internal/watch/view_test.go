package watch

import (
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
)

// Seconds of which not all pauses are known are drawn as that; seconds without a pause are empty.
func TestWatchedKnowsWhatItDoesNot(t *testing.T) {
	t0 := time.Unix(1_800_000_000, 0)
	answer := func(pauses uint64, at ...time.Duration) control.Status {
		s := control.Status{Counts: clockpage.Counts{Pauses: pauses}, Since: t0.Add(-time.Hour)}
		for i, after := range at {
			s.Records = append(s.Records, clockpage.Record{Number: pauses - uint64(len(at)-1-i), ResidualStop: 150, ContReal: uint64(t0.Add(after).UnixNano())})
		}
		return s
	}
	d := &watched{host: &watchedHost{}}
	d.forget()
	tell := func(after time.Duration, s control.Status) {
		d.answered(shimAnswered{entry: status.Entry{Status: s}, at: t0.Add(after)})
	}
	line := func(after time.Duration, seconds int, want string) {
		t.Helper()
		if got := d.sparkline(t0.Add(after), seconds); got != want {
			t.Errorf("after %v: %q, want %q", after, got, want)
		}
	}
	const s = time.Second
	tell(0, answer(5, -4*s, -2*s, -1*s)) // of the first two nothing is known
	line(0, 6, "·▂ ▂▂ ")
	tell(1*s, answer(6, -2*s, -1*s, 1*s))
	tell(2*s, answer(6, -2*s, -1*s, 1*s))
	line(2*s, 6, " ▂▂ ▂ ")
	// It is silent for six seconds, and the ring has gone round.
	tell(8*s, answer(500, 6*s, 7*s, 8*s))
	line(8*s, 8, "▂ ···▂▂▂")
	// A new QEMU counts anew.
	tell(9*s, answer(1, 9*s))
	line(9*s, 3, "  ▂")
	if d.rate() != "-" {
		t.Errorf("the rate is %s after one answer", d.rate())
	}
	tell(11*s, answer(41, 9*s, 10*s))
	if d.rate() != "20.0" {
		t.Errorf("the rate is %s", d.rate())
	}
	// One that can't be asked isn't known to have had no pause.
	d.answered(shimAnswered{entry: status.Entry{Mute: true, Status: control.Status{State: status.Gone}}, at: t0.Add(12 * s)})
	line(13*s, 3, " · ")
	tell(14*s, answer(42, 1e6*s))
	if second := t0.Unix() + 1e6; d.columns[second] != 0 {
		t.Error("a pause in the far future is kept")
	}
}
