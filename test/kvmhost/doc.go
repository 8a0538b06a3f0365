// Package kvmhost runs a command on a KVM host: on this machine where it has /dev/kvm, and else on an emulated one that
// it boots for the command.
//
// It is for whoever wants to see ftclock proven on a machine without KVM: the demo, the end-to-end tests, CI. It is not a
// place for timings, since every instruction in it is emulated: package rig measures those on the machine itself.
//
// # Theory of operation
//
// QEMU's TCG emulates AMD SVM with nested paging on any x86-64 machine, so that a stock Debian kernel has a real kvm_amd
// and a real /dev/kvm in it. Prepare fetches that kernel as a Debian package and keeps it below build/; nothing is
// installed. The host's file system is this machine's own / by 9p, read-only, below a tmpfs: libvirt, QEMU and whatever
// was built out here are there, and nothing that is done in there gets out, but for the directories that Options.Write
// names. It has no network but the loopback interface.
//
// Process 1 of the host is package main in init, from an initramfs. It loads the modules, lays out the file systems and
// runs one command, which it gets with its environment as JSON over a virtio serial port. Three further ports are the
// command's standard streams; the exit code comes back by the first one. Ctrl-C is passed on; the second one, or the end
// of Options.Timeout, takes the host away, and with it everything that runs in it.
//
// The emulated way needs no privilege: what an ordinary user can't read of / isn't there in the host.
package kvmhost
