// Command bench measures ftclock side by side with stock QEMU and with other ways to keep a guest's clock, and what it
// costs: one run, one machine, the same guests, in turns.
//
// It is for `make bench`, which writes docs/performance.md and its pictures, and for `make bench-quick`, a short form
// that only shows that all of it works. Clocks are read from outside the guests; of what ftclock says itself only the
// module's own time is used. What a row claims of a clock is checked, and makes the program fail; times are judged by
// nobody, they belong to the machine and its load.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"ftclock/test/privatelibvirt"
	"ftclock/test/rig"
)

func main() {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "measure little, write nothing but the page")
	flag.StringVar(&o.only, "only", "", "measure only the sections whose name begins with one of these, separated by commas")
	flag.StringVar(&o.page, "page", "docs/performance.md", "the page, of which what is between the marks of a section is written; - prints that")
	flag.StringVar(&o.pictures, "pictures", "docs/pictures", "where the pictures go; empty: none")
	flag.StringVar(&o.guest, "guest", "build/bench-guest", "what fetch.sh made, for the guest with an agent")
	flag.DurationVar(&o.longest, "longest", 4*time.Minute, "no section measures for longer than about that, with less pauses, rounds or domains if need be; the page says how many there were")
	flag.Parse()
	if why := missing(); why != "" {
		fmt.Fprintln(os.Stderr, "bench: error:", why)
		os.Exit(1)
	}
	os.Exit(privatelibvirt.Main(func() int {
		if err := run(o, os.Stdout, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, "bench: error:", err)
			return 1
		}
		return 0
	}, privatelibvirt.Installed(".")))
}

// missing says in one line why this can't be measured here, with the fix, or is empty.
func missing() string {
	if why := privatelibvirt.MissingFor("bench"); why != "" {
		return why
	}
	return rig.Missing()
}
