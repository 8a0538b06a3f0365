// Package node finds the QEMUs of a host and has those served that the host's policy names, whoever started them and in whatever
// namespaces they live. It is for `ftclock node`.
//
// It serves none itself: the command says how that is done (Server), as it is for `ftclock attach`. And it is no supervisor: a
// QEMU that is served needs it no more.
//
// # Theory of operation
//
// The kernel tells of every execve of the host (its process connector). Such a word is only a reason to look at that process: if
// its program is a QEMU, and a file of the policy names its guest, the node waits until the QEMU has its virtual machine and its
// main thread is idle, and has it served. Words that the kernel had to drop, and QEMUs that were there before, are found by a look
// at all of /proc. Where the kernel doesn't tell this process, it looks at all of /proc every half second.
//
// A process is remembered by its pidfd and its start time. The node holds one pidfd for each QEMU that a file names, and forgets
// it when the process ends. It writes nothing down: after a restart it finds what is served already by asking the shims.
//
// What a QEMU says of itself, its name and UUID, isn't trusted: it can get itself served, or not, and nobody else.
package node
