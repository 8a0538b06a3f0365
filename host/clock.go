package host

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Clock is the state of the host's CLOCK_REALTIME, as the kernel has it from whoever disciplines it: adjtimex(2).
type Clock struct {
	// Synchronised says that somebody keeps it, such as chronyd.
	Synchronised bool
	// Offset is what is still to be corrected, in ns.
	Offset int64
	// EstimatedError and MaximumError are in ns, and not below 0. The kernel lets the latter grow by 500 ppm while nobody tells
	// it better, to 16 s.
	EstimatedError, MaximumError int64
	// Rate is by how much it runs faster than CLOCK_MONOTONIC_RAW, in ppb.
	Rate int64
}

// adjtimex asks the kernel; tests ask somebody else.
var adjtimex = unix.Adjtimex

// ReadClock asks the kernel once. A container or a sandbox may forbid it.
func ReadClock() (Clock, error) {
	var t unix.Timex
	state, err := adjtimex(&t)
	if err != nil {
		return Clock{}, os.NewSyscallError("adjtimex", err)
	}
	return clockOf(&t, state), nil
}

func clockOf(t *unix.Timex, state int) Clock {
	c := Clock{
		Synchronised:   state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0,
		Offset:         t.Offset,
		EstimatedError: max(t.Esterror, 0) * 1000,
		MaximumError:   max(t.Maxerror, 0) * 1000,
		// A tick is nominally 10,000 us; freq is in 2^-16 ppm.
		Rate: (t.Tick-10000)*100_000 + t.Freq*1000/65536,
	}
	if t.Status&unix.STA_NANO == 0 {
		c.Offset *= 1000
	}
	return c
}

// BootID tells this boot of this host from any other: 36 characters; "" where the kernel doesn't say.
func BootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
