// Package platform proves the behaviours of the kernel, QEMU and libvirt that
// ftclock's design relies on, one file each. A file's head says what would
// break without it. When one of these fails on a new release, the design must
// change there, whatever the other tests say.
//
// Package kernel below needs nothing but Linux and gcc; package hypervisor
// needs KVM, QEMU and the private libvirt.
package platform
