// Command cost measures what a domain's shim costs, on this machine, now: the round trip of a QMP command through it
// and, for comparison, through socat, each over the direct one; its memory; its processor time for a checkpoint; and how
// often it wakes up when nothing passes.
//
// It is for `make cost`. It uses a QEMU of its own without libvirt, touches nothing else on the machine, and judges
// nothing: figures of one run belong together, those of two runs needn't.
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := measure(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "cost: error:", err)
		os.Exit(1)
	}
}
