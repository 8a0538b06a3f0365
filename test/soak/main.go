// Command soak pauses a kvmclock guest a million times and looks what is left of its clock: how far it is off, whether
// that grows, and how what the module found at each pause is distributed.
//
// It is for whoever wants to know how exact ftclock stays, by `make soak`; docs/accuracy.md has what it found. The guest
// runs in a QEMU that libvirt didn't start, by `ftclock attach`: an engine of its own pauses it as fast as QEMU's monitor
// goes. The drift is measured from outside the guest and trusts nothing that ftclock says; the residuals are the module's.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"ftclock/test/privatelibvirt"
)

func main() {
	var p plan
	flag.IntVar(&p.pauses, "pauses", 1_000_000, "how many")
	flag.DurationVar(&p.longest, "longest", 2*time.Millisecond, "of a pause, and of the time between two")
	flag.DurationVar(&p.end, "for", 24*time.Hour, "end after that time, however many there were")
	picture := flag.String("picture", "soak.svg", "where the picture goes; .svg or .png")
	flag.Parse()
	if why := privatelibvirt.MissingFor("soak"); why != "" {
		fmt.Fprintln(os.Stderr, "soak: error:", why)
		os.Exit(1)
	}
	os.Exit(privatelibvirt.Main(func() int {
		r, err := soak(p, os.Stderr)
		if err == nil {
			fmt.Println(r)
			err = r.draw(*picture)
		}
		if err == nil {
			err = r.verdict()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "soak: error:", err)
			return 1
		}
		return 0
	}, privatelibvirt.Installed(".")))
}
