// Package linuxguest is a real Linux as the guest of ftclock's tests: a
// kernel, an init of our own and nothing else. It is for what only Linux
// shows: CLOCK_REALTIME and CLOCK_MONOTONIC as a program in the guest reads
// them, and what the guest's kernel says about its clock.
//
// The kernel is the one named by FTCLOCK_TEST_KERNEL (a vmlinux, a vmlinuz,
// or either packed with xz), or the machine's own newest where the CPU has
// hardware virtualization.
//
// It isn't a distribution: there is no shell, no disk and no network. For a
// guest that starts in a few seconds see package guest.
package linuxguest
