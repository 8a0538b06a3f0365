// Package reliability kills the shim while it carries a monitor and checks that neither peer can tell: no byte, no
// descriptor and no connection may be lost, at whatever instruction a process dies. It needs neither QEMU nor libvirt: both
// peers are ours, and write down everything.
package reliability
