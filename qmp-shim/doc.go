// Package shim (import path ftclock/qmp-shim) keeps one domain's clock right. Package relay carries
// the domain's monitor and tells it of stop and cont. It has the module loaded into QEMU, gives it
// the policy and the orders, keeps the record, and answers requests about its state. What is done
// with a pause, the module alone decides.
//
// It is for cmd/ftclock-shim, one shim for each domain. It isn't a QMP client: it sends nothing of
// its own to QEMU. To libvirt it sends only one thing: the refusal of a domain's first cont, when
// the domain requires ftclock and can't have it.
package shim
