// Package guest is the kvmclock guest of ftclock's tests: a freestanding program that a hypervisor
// boots in place of a kernel, and the reader that takes the guest's clock out of its memory from
// outside.
//
// It is for tests and the demo. It isn't an operating system: it has no devices, no interrupts and
// no user space. For what only Linux shows see package linuxguest.
package guest
