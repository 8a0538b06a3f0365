package shim

import (
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

// guestClock words what the module saw that the guest has switched on; for NoClock, it has run without for so long.
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
