// Package linuxguest is a real Linux as the guest of ftclock's tests: the
// distribution's own kernel, an init of our own and nothing else. It is for
// what only Linux shows: CLOCK_REALTIME and CLOCK_MONOTONIC as a program in the
// guest reads them, on each vCPU and across them, and what the guest's kernel
// says about its clock.
//
// The kernel is the machine's own newest, in the emulated host (package kvmhost)
// the emulated host's, or the one named by FTCLOCK_TEST_KERNEL.
//
// It isn't a distribution: there is no shell, no disk and no network. For a
// guest that starts at once see package guest.
package linuxguest
