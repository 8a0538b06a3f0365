// Command cost measures what a domain's shim costs, on this machine, now: the round trip of a QMP command through it
// and, for comparison, through socat, each over the direct one; its memory; its processor time for a checkpoint; and how
// often it wakes up when nothing passes. And it counts what the module does at a stop and a cont.
//
// It is for `make cost`. It uses a QEMU of its own without libvirt, touches nothing else on the machine, and judges
// nothing: figures of one run belong together, those of two runs needn't.
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	if err := errors.Join(costs(os.Stdout), count(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "cost: error:", err)
		os.Exit(1)
	}
}
