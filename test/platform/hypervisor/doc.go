// Package hypervisor proves what ftclock relies on of KVM, QEMU and libvirt; see package platform. It needs /dev/kvm.
package hypervisor
