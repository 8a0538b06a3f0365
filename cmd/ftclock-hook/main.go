// Command ftclock-hook is libvirt's qemu hook; see package hooks. libvirt calls it as hooks/qemu.d/50-ftclock.
package main

import (
	"os"

	"ftclock/hooks"
)

func main() {
	os.Exit(hooks.Run(hooks.System, os.Args[1:], os.Stdin, os.Stderr))
}
