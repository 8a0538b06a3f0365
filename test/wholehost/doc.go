// Package wholehost tests what happens to whole hosts. Each test boots a Debian with its own
// systemd, libvirt and QEMU on an emulated machine (kvmhost.Boot), installs ftclock's package as an
// operator would, and cuts the power, kills or migrates. The tests themselves run on the machine,
// and need no /dev/kvm.
package wholehost
