// Package keeper lets a shim survive its own death. Something outside the process also holds
// whatever the shim has open and can't open again, and starts the shim again with all of it. So
// neither libvirt nor QEMU sees a connection end.
//
// Under systemd that is systemd, with its file descriptor store and Restart= in the unit. Elsewhere
// it is a second process of the same program, the keeper. It does systemd's part and speaks the
// same protocol, sd_notify(3), as far as shims need it. So the shim has one way to keep
// descriptors: Store.
//
// It is for cmd/ftclock-shim. It knows descriptors only by name, and reads none of them.
package keeper
