// Package keeper lets a shim survive its own death. What the shim has open and can't open again is also held by somebody
// else, who starts the shim again with all of it, so that neither libvirt nor QEMU sees a connection end.
//
// Under systemd that is systemd: its file descriptor store, and Restart= in the unit. Elsewhere it is a process of this
// program's, the keeper, which is to the shim what systemd is: it speaks the same protocol, sd_notify(3), in so far as
// shims do. So the shim has one way of keeping descriptors, Store.
//
// It knows descriptors by name and looks into none of them.
package keeper
