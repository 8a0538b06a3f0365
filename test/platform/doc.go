// Package platform tests the behaviours of the kernel, QEMU and libvirt on which ftclock's design
// relies, one file for each. The head of a file says what would break without that behaviour. If
// one of these tests fails on a new release, the design must change there, whatever the other tests
// say.
//
// Package kernel, in the folder below, needs only Linux and gcc. Package hypervisor needs KVM, QEMU
// and the private libvirt.
package platform
