// Package linuxguest is a real Linux as the guest of ftclock's tests: the distribution's own
// kernel, an init of ours and nothing else. It is for what only Linux shows: CLOCK_REALTIME and
// CLOCK_MONOTONIC as a program in the guest reads them, on each vCPU and across them, and what the
// guest's kernel says about its clock.
//
// The kernel is the machine's newest; in the emulated host (package kvmhost) it is that host's.
// FTCLOCK_TEST_KERNEL names another one.
//
// It isn't a distribution: there is no shell, no disk and no network. For a guest that starts at
// once see package guest.
package linuxguest
