// Package wholehost holds the tests of what happens to whole hosts: each boots a Debian with its own systemd, libvirt and QEMU on
// an emulated machine (kvmhost.Boot), installs ftclock's package as an operator would, and pulls plugs. The tests themselves
// run on the machine, and need no /dev/kvm.
package wholehost
