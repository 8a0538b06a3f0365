package main

import (
	"testing"

	"ftclock/control"
)

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
