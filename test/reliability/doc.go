// Package reliability kills the shim while it relays a monitor and checks that neither peer
// notices: no byte, no descriptor and no connection may be lost, at whatever instruction a process
// dies. It needs neither QEMU nor libvirt: both peers are its own, and record everything.
package reliability
