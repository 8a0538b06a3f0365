// Package test has no code: this is the map of its folders.
//
// # Tests
//
// e2e, docs, virtmanager run in a private libvirt; systemd and packages in containers that boot a whole Debian; wholehost
// on emulated machines; reliability without a hypervisor. platform proves what the kernel, QEMU and libvirt do.
//
// # Programs that measure or show
//
// demo, bench, soak, cost, shell.
//
// # What they share
//
//   - check: errors, bounds and waiting, for every test. It knows nothing of ftclock.
//   - domaintest: domains, their clocks, pauses and states, for tests.
//   - measure: statistics, processes, tables, pages and plots, for programs.
//   - privatelibvirt: the libvirt, its domains and their metadata, for both. rig: QEMUs without libvirt.
//   - guest, linuxguest: what runs in the domains, and the reader of its clock; guest.MaxDrift is what a clock may be off.
//   - kvmhost, container: where it all runs. built: what was compiled for it. qmp, endings, hang, history, initramfs: one
//     thing each.
//
// Tests and programs import helpers, and helpers import helpers below them, in the order that imports_test.go has and checks.
// None imports a test or a program.
package test
