package shim

import (
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

// kept is how the domain's clock is kept, given what the guest has switched on; for Unkept, without is for how long it has run so. The
// caller holds d.mu.
func (d *domain) kept() (state control.State, clock control.GuestClock, without time.Duration) {
	state = d.state
	if d.page == nil {
		return state, "", 0
	}
	clock, without = guestClock(d.page)
	if state == control.Correcting && clock == control.NoClock {
		state = control.Unkept
	}
	return state, clock, without
}

// guestClock words what the module saw.
func guestClock(page *clockpage.Page) (control.GuestClock, time.Duration) {
	seen, err := page.Clocks()
	if err != nil {
		if h, err := page.Head(); err == nil && h.Minor < 2 {
			return control.ClockOldModule, 0
		}
		return control.ClockNotSeen, 0
	}
	switch without := time.Duration(min(seen.Without, uint64(time.Hour))); {
	case seen.On >= clockpage.ClockNotKnown:
		return control.ClockNotKnown, 0
	case seen.On&clockpage.KVMClock != 0:
		return control.KVMClock, 0
	case seen.On&clockpage.HyperVPage != 0:
		return control.HyperVPage, 0
	case seen.On&clockpage.HyperVCounter != 0:
		return control.HyperVCounter, 0
	case without < control.UnkeptAfter:
		return control.NoClockYet, 0
	default:
		return control.NoClock, without
	}
}
