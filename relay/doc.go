// Package relay moves the bytes and file descriptors of one monitor connection between libvirt and QEMU, loses none of them if its
// process dies, and tells an observer of the QMP messages that go by.
//
// It is for the shim, which decides what a stop and a cont mean. It knows nothing of domains, clocks or the module, and is no QMP
// client: a message is recognised in a copy of its bytes, and the one thing that an observer may do is to keep a cont waiting, or,
// while it says so beforehand, to have it refused.
package relay

/*
Theory of operation

The relay must be able to die between any two instructions without losing a byte. So bytes are never in its memory
alone. It looks at what has come with MSG_PEEK, which takes nothing away, and moves it with splice(2): from the socket into a
pipe, and from the pipe to the other socket. Each of the two calls moves bytes from one kernel object to another,
whole, and both objects are kept beyond its life. A worker that takes over finds in the pipe what the last one had
under way, and sends it first.

splice loses descriptors. So before a byte that carries some, splicing stops, and that one byte is sent with the copies
that a peek gave, and then spliced away into the pipe, where what is left of it can be told from what is under way:
a word, carry, says which of the two the pipe holds. So a byte can be lost only if the worker dies in the
nanoseconds between that word's being set and the kernel's being asked to send the message.

A peek doesn't tell which byte it is. It collects the descriptors of the first message in the queue that has any, even
if it lies behind all the bytes that were asked for, and shows no bytes behind that message (net/unix/af_unix.c,
unix_stream_read_generic). So the relay relies on what libvirt and QEMU do: descriptors are sent with the first byte of a
line, and what is sent with them is one line, or a beginning of one.

Each direction has a goroutine that waits in the Go runtime's poller for what comes and, seldom, for room where it goes. Its
system calls never wait, and are made without telling the scheduler (unix.RawSyscall). That matters: a call that the scheduler
is told of, or a thread that waits in one, has it wake its monitor thread and a second thread to take over, several context
switches a message where the poller needs one. So does the poller itself if it is given a socket: it then waits for room, too, and
is woken up each time that the other side has read. It gets an epoll file that waits for bytes only (make cost, docs/performance.md).

The recogniser gets the bytes after they have gone into the pipe and before they leave it. What it knows dies with the
worker; one word a direction, mid, tells the next one whether the stream was between two messages, where a
recogniser can begin, or not: then it waits for a newline.
*/
