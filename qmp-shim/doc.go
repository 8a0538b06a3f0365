// Package shim keeps one domain's clock: it relays the domain's monitor between libvirt and QEMU, recognises stop and
// cont on the way, has the module loaded into QEMU, gives it the policy and the orders, and answers for its state.
//
// It is for cmd/ftclock-shim, one process a domain. It is not a QMP client: it sends nothing of its own to QEMU, and
// to libvirt only one thing, a refusal of the first cont of a domain that requires what can't be had.
package shim
