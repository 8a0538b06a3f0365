// Package shim (import path ftclock/qmp-shim) keeps one domain's clock right. It relays the
// domain's monitor between libvirt and QEMU, recognises stop and cont, has the module loaded into
// QEMU, gives it the policy and the orders, keeps the record, and answers requests about its state.
//
// It is for cmd/ftclock-shim, one shim for each domain. It isn't a QMP client: it sends nothing of
// its own to QEMU. To libvirt it sends only one thing: the refusal of a domain's first cont, when
// the domain requires ftclock and can't have it.
package shim
