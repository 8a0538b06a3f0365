// Package privatelibvirt runs tests and demos inside a libvirt of their own, which can't touch the
// machine's. It lives in mount, pid, ipc and network namespaces; its configuration, state and logs
// are on a tmpfs; and all that was started in it ends with it.
//
// # Theory of operation
//
// Main starts the program a second time as process 1 of new namespaces, the stage "init". That
// stage makes the private file systems, starts the program a third time, the stage "inner", and
// from then on only reaps: QEMU is a daemon, its parent is process 1, and libvirt takes an unreaped
// QEMU for one that can't be killed. The inner stage starts dbus-daemon, virtlogd and libvirtd as
// its children, waits until libvirt answers and calls the caller's function. Its exit code is
// handed up through both.
//
// /etc is a copy, so that an installation may write there. Control groups are hidden, so that
// libvirt creates none, also not on the machine. /dev/kvm is a node of its own, open to the group
// kvm, so that QEMU runs as the distribution's unprivileged user, whatever the mode of the
// machine's node.
//
// It isn't a sandbox: it runs as root, and all file systems not named here are the machine's.
package privatelibvirt
