// The missing command says which of the tests that need a real libvirt and
// KVM this machine can't run, and what would change that. go test hides what
// a passing package prints; make test calls this first. It fails where
// nothing may be left out (FTCLOCK_REQUIRE=1, or CI=true with /dev/kvm). A
// kernel for the Linux guest can't be had everywhere: without one, that test is
// left out even there, and said to be.
package main

import (
	"fmt"
	"os"

	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"
)

func main() {
	missing := privatelibvirt.Missing()
	for _, m := range missing {
		fmt.Fprintln(os.Stderr, "LEFT OUT: all end-to-end tests:", m)
	}
	linux := linuxguest.Missing()
	for _, m := range linux {
		fmt.Fprintln(os.Stderr, "LEFT OUT: the tests with a Linux guest:", m)
	}
	if len(missing) > 0 && privatelibvirt.Required() {
		os.Exit(1)
	}
}
