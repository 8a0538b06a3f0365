// Package container boots a whole Debian with systemd, libvirt and QEMU beside the machine's own,
// for tests of units and packages. It runs systemd-nspawn on a tree that debootstrap made. The
// container has /dev/kvm, and a network of its own with only the loopback interface.
//
// The tree is made once for each suite and kept in the user's cache. What a container writes stays
// in memory and is gone when it ends. The machine isn't changed, and a container ends with the
// program that started it.
package container
