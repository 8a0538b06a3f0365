// Command ftclock-kubevirt is a hook of KubeVirt's, onDefineDomain: it writes ftclock's metadata into the domain of a
// VirtualMachineInstance (VMI) that asks for it by its annotations.
//
// KubeVirt's sidecar-shim runs it before the VMI's domain is defined: onDefineDomain --vmi JSON --domain XML. What it prints becomes
// the domain. It serves no clock: ftclock on the node does.
package main

import "os"

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}
