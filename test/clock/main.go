// Command clock reads the clocks of running domains with the kvmclock guest, on a whole host where no test program runs: for each
// name a line "NAME OFFSET BACKSTEPS REALTIME SLEPT": the offset against CLOCK_MONOTONIC_RAW in ns, how often the guest saw time go back,
// how far CLOCK_REALTIME is ahead of CLOCK_MONOTONIC_RAW, and how long the host slept since it booted, in ns.
package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"ftclock/host"
	"ftclock/test/guest"

	"golang.org/x/sys/unix"
)

func main() {
	for _, name := range os.Args[1:] {
		offset, backsteps, err := read(name)
		if err != nil {
			fmt.Fprintf(os.Stderr, "clock: error: %s: %v\n", name, err)
			os.Exit(1)
		}
		fmt.Println(name, offset, backsteps, guest.RealtimeAhead(), slept())
	}
}

func read(name string) (offset, backsteps int64, err error) {
	text, err := os.ReadFile(host.PIDFile(host.LibvirtRun, name))
	if err != nil {
		return 0, 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, 0, err
	}
	c, err := guest.Open(pid)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	if err := c.WaitMoving(5 * time.Minute); err != nil {
		return 0, 0, err
	}
	if offset, err = c.SettledOffset(); err != nil {
		return 0, 0, err
	}
	count, _, err := c.Backsteps()
	return offset, int64(count), err
}

// slept is how long the host slept since it booted, to some us or what this program was away for, ns.
func slept() int64 {
	var mono, boot unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return boot.Nano() - mono.Nano()
}
