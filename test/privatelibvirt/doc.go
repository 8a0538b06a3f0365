// Package privatelibvirt runs tests and demos inside a libvirt of their own,
// which can't touch the machine's: it lives in mount, pid, ipc and network
// namespaces, its configuration, state and logs are on a tmpfs, and all that
// was started in it dies with it.
//
// # Theory of operation
//
// Main starts the program a second time as process 1 of new namespaces, the
// stage "init". That one makes the private file systems, starts the program a
// third time, the stage "inner", and from then on only reaps: QEMU is a
// daemon, its parent is process 1, and libvirt takes an unreaped QEMU for one
// that can't be killed. The inner stage starts dbus-daemon, virtlogd and
// libvirtd as its children, waits until libvirt answers and calls the
// caller's function. Its exit code is handed up through both.
//
// /etc is a copy, so that an installation may write there. The control groups
// are out of sight: without them libvirt makes none, on the machine neither.
// /dev/kvm is a node of its own, open to the group kvm, so that QEMU runs as
// the unprivileged user of the distribution whatever the machine's node says.
//
// It is not a sandbox: it is root's, the file systems other than those named
// are the machine's.
package privatelibvirt
