// Command ftclock is the operator's side of ftclock: it enables and disables the correction of a libvirt domain's
// clock, shows how clocks are kept, checks a host, and exercises a domain as a checkpoint engine would.
//
// It is the only program of ftclock that talks to libvirt. It corrects no clock itself: the module inside QEMU does, with the
// domain's shim beside it.
package main

import "os"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
