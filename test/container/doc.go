// Package container boots a whole Debian with systemd, libvirt and QEMU beside the machine's own, for tests of units and
// packages. It is systemd-nspawn on a tree that debootstrap made, with a network of its own that has nothing but the
// loopback interface, and /dev/kvm.
//
// The tree is made once a suite and kept in the user's cache; whatever a container writes goes to memory and is gone
// with it. Nothing of the machine is changed, and a container ends with the program that started it.
package container
