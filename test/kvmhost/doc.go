// Package kvmhost runs a command on a KVM host: on this machine if it has /dev/kvm, else on an
// emulated host that it boots for the command.
//
// It is for the demo, the end-to-end tests and CI on machines without KVM. It isn't for measuring
// times, since every instruction in the host is emulated; package rig measures on the machine
// itself.
//
// # Theory of operation
//
// QEMU's TCG emulates AMD SVM with nested paging on any x86-64 machine, so a stock Debian kernel in
// it has a real kvm_amd and a real /dev/kvm. That kernel is fetched as a Debian package and
// kept below build/; nothing is installed. The host's file system is this machine's own /, over 9p,
// read-only, below a tmpfs. So libvirt, QEMU and whatever was built here are in the host, and
// nothing that is written there gets out, except in the directories that Options.Write names. The host has no network but the loopback interface.
//
// Process 1 of the host is package main in init, from an initramfs. It loads the kernel modules,
// mounts the file systems and runs one command, which it gets with its environment as JSON over a
// virtio serial port. Three further ports are the command's standard streams. The exit code comes
// back over the first port. Ctrl-C is passed on. A second Ctrl-C, or the end of Options.Timeout,
// ends the host and everything that runs in it.
//
// The emulated host needs no privilege: what an ordinary user can't read below / is missing in the
// host.
package kvmhost
