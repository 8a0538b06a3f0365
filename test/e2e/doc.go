// Package e2e tests the whole of ftclock, installed in a private libvirt as an operator would, on real domains: every case
// says what happens to a domain, and measures its guest's clock from outside.
//
// It is not for a parser, a rule or a protocol, which have tests of their own, nor for units and packages: those are in
// test/systemd, test/packages and test/wholehost. Every test's name begins with TestKVM: it needs /dev/kvm, here or on the
// emulated host of package kvmhost.
package e2e
