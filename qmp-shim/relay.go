package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

/*
Theory of operation

The relay must be able to die between any two instructions without losing a byte. So bytes are never in its memory
alone. It looks at what has come with MSG_PEEK, which takes nothing away, and moves it with splice(2): from the socket into a
pipe, and from the pipe to the other socket. Each of the two calls moves bytes from one kernel object to another,
whole, and both objects are held by the keeper too. A worker that takes over finds in the pipe what the last one had
under way, and sends it first.

splice loses descriptors. So before a byte that carries some, splicing stops, and that one byte is sent with the copies
that a peek gave, and then spliced away into the pipe, where what is left of it can be told from what is under way:
a word, carry, says which of the two the pipe holds. So a byte can be lost only if the worker dies in the
nanoseconds between that word's being set and the kernel's being asked to send the message.

A peek doesn't tell which byte it is. It collects the descriptors of the first message in the queue that has any, even
if it lies behind all the bytes that were asked for, and shows no bytes behind that message (net/unix/af_unix.c,
unix_stream_read_generic). So the relay relies on what libvirt and QEMU do: descriptors are sent with the first byte of a
line, and what is sent with them is one line, or a beginning of one.

Each direction has a thread that waits in the kernel for its next bytes: in recvmsg for what comes, in splice for room
where it goes. That is three system calls for a message, and none while nothing comes. The Go runtime's poller would take
twice as many and wake up each time that the other side has read.

The recogniser gets the bytes after they have gone into the pipe and before they leave it. What it knows dies with the
worker; one word a direction, mid, tells the next one whether the stream was between two messages, where a
recogniser can begin, or not: then it waits for a newline.
*/

// Sizes of the relay.
const (
	// chunkSize is how much is looked at and moved at a time. Messages may be of any size: they are never collected.
	chunkSize = 32 << 10
	// maxFDs is what the kernel lets one message carry (SCM_MAX_FD in include/net/scm.h).
	maxFDs = 253
	// maxQueue is more than a unix socket queues: twice net.core.wmem_default, which nobody raises for a monitor.
	maxQueue = 512 << 10
)

// The two directions.
const (
	up   = 0 // client to QEMU
	down = 1
)

// errTruncated is the end of a connection that lost descriptors on the way: this process ran out of them.
var errTruncated = errors.New("file descriptors were lost in a message (MSG_CTRUNC)")

// An observer sees what a relay recognises, in the stream's order, each direction from its own goroutine.
type observer interface {
	// command sees a command that is about to go on to QEMU.
	command(m message)
	// cont sees a cont before QEMU gets its last byte, and may take its time, bounded. A refusal, a single line, is
	// possible only while gated says so: it goes back to the client, and QEMU never sees the command.
	cont(m message) (refusal string)
	gated() bool
	// fromQEMU sees a message of QEMU's before the client gets its last byte.
	fromQEMU(m message)
}

// A relay moves the bytes and file descriptors of one connection between a client, libvirt, and QEMU.
type relay struct {
	client, qemu *net.UnixConn
	pipes        [2]pipe
	mid, carry   [2]*uint32
	observer     observer

	// mu guards what is written to the client: QEMU's bytes, and between its messages our refusals.
	mu       sync.Mutex
	queued   []byte
	messages recogniser // QEMU's, as far as they have gone on to the client
}

// A pipe is what bytes are in between two sockets. The numbers stay the caller's.
type pipe struct{ r, w int }

// run moves bytes until the connection has ended, as seen from either side. The connections can't be used through
// package net any more.
func (r *relay) run() error {
	client, err := blocking(r.client)
	if err != nil {
		return err
	}
	defer unix.Close(client)
	qemu, err := blocking(r.qemu)
	if err != nil {
		return err
	}
	defer unix.Close(qemu)
	var group sync.WaitGroup
	var errs [2]error
	group.Go(func() {
		runtime.LockOSThread() // it waits in the kernel, and goes on in the thread that was woken
		defer runtime.UnlockOSThread()
		errs[up] = r.up(client, qemu)
		_ = unix.Shutdown(qemu, unix.SHUT_WR)
	})
	group.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		errs[down] = r.down(qemu, client)
		hangUp(r.client)
	})
	group.Wait()
	return errors.Join(errs[:]...)
}

// blocking gives a descriptor of the connection's, for the caller to close, on which calls wait.
func blocking(c *net.UnixConn) (own int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(fd uintptr) {
		if own, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			err = unix.SetNonblock(own, false)
		}
	})
	return own, errors.Join(cerr, err)
}

// hangUp ends both directions at once, as QEMU's own close does: after an end of one only, libvirt doesn't look into QEMU's
// log for the reason (qemu_monitor.c, qemuMonitorIO). It also ends our reading from that side.
func hangUp(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// up moves what the client sends.
func (r *relay) up(client, qemu int) error {
	m, commands, err := r.begin(up, client, qemu)
	if err != nil {
		return ended(err)
	}
	for {
		look, err := m.look(func(b []byte) bool {
			return !r.withheld(commands, b)
		})
		if err != nil {
			return ended(err)
		}
		if r.observer.gated() {
			// One message at a time.
			ahead := commands
			if n, message, complete := ahead.feed(look); complete {
				look = look[:n]
				if commands.idle() && message.execute == "cont" {
					if err := r.gate(m, message, n); err != nil {
						return ended(err)
					}
					continue
				}
			}
		}
		// As far as the last byte of a cont, or with it if it is the first.
		ahead, n := commands, 0
		for n < len(look) {
			used, message, complete := ahead.feed(look[n:])
			if complete && message.execute == "cont" {
				if n+used > 1 {
					n += used - 1
				} else {
					n = 1
				}
				break
			}
			n += used
		}
		if err := m.move(look[:n], func(b []byte) {
			r.feed(&commands, b, func(message message) {
				if message.execute == "cont" {
					r.observer.cont(message)
				} else if message.execute != "" {
					r.observer.command(message)
				}
			})
		}, func() bool { return commands.idle() }); err != nil {
			return ended(err)
		}
	}
}

func (r *relay) feed(to *recogniser, b []byte, tell func(message)) {
	for len(b) > 0 {
		n, m, complete := to.feed(b)
		b = b[n:]
		if complete {
			tell(m)
		}
	}
}

// withheld says that b, all that has come, isn't enough to tell whether it begins with a cont that may be refused.
func (r *relay) withheld(commands recogniser, b []byte) bool {
	if !r.observer.gated() || !commands.idle() || len(b) == chunkSize {
		return false
	}
	_, _, complete := commands.feed(b)
	return !complete && !commands.idle() && !commands.isLost()
}

// gate has the observer decide upon a cont, which is there as a whole, n bytes, of which QEMU has had none.
func (r *relay) gate(m *mover, cont message, n int) error {
	if refusal := r.observer.cont(cont); refusal != "" {
		if err := r.refuse(cont.id, refusal); err != nil {
			return err
		}
		return m.discard(n)
	}
	for n > 0 {
		look, err := m.look(nil)
		if err != nil {
			return err
		}
		look = look[:min(n, len(look))]
		n -= len(look)
		rest := n
		if err := m.move(look, func([]byte) {}, func() bool { return rest == 0 }); err != nil {
			return err
		}
	}
	return nil
}

// down moves what QEMU sends.
func (r *relay) down(qemu, client int) error {
	m, messages, err := r.begin(down, qemu, client)
	if err != nil {
		return ended(err)
	}
	r.mu.Lock()
	r.messages = messages
	r.mu.Unlock()
	for {
		look, err := m.look(nil)
		if err != nil {
			return ended(err)
		}
		r.mu.Lock()
		if len(r.queued) > 0 { // as far as the end of the message that ours is to be put behind
			ahead := r.messages
			if n, _, complete := ahead.feed(look); complete {
				look = look[:n]
			}
		}
		err = m.move(look, func(b []byte) {
			r.feed(&r.messages, b, r.observer.fromQEMU)
		}, func() bool { return r.messages.idle() })
		if err == nil {
			err = r.flush()
		}
		r.mu.Unlock()
		if err != nil {
			return ended(err)
		}
	}
}

// refuse answers a command in QEMU's place, as soon as QEMU isn't in the middle of a message.
func (r *relay) refuse(id, reason string) error {
	desc, err := json.Marshal(reason)
	if err != nil {
		return fmt.Errorf("wording a refusal: %w", err)
	}
	answer := ""
	if id != "" {
		answer = `"id": ` + id + `, `
	}
	answer = "{" + answer + `"error": {"class": "GenericError", "desc": ` + string(desc) + "}}\r\n"
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queued = append(r.queued, answer...)
	return r.flush()
}

// flush writes what is queued for the client, between two messages. The caller holds r.mu.
func (r *relay) flush() error {
	if len(r.queued) == 0 || !r.messages.idle() && !r.messages.isLost() {
		return nil
	}
	b := r.queued
	r.queued = nil
	raw, err := r.client.SyscallConn()
	if err != nil {
		return err
	}
	for len(b) > 0 {
		var n int
		cerr := raw.Control(func(fd uintptr) { n, err = unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_NOSIGNAL) })
		if err = errors.Join(cerr, err); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// begin makes a direction's mover, sends what the last worker had under way, and finds the recogniser's place.
func (r *relay) begin(direction, from, to int) (*mover, recogniser, error) {
	m := &mover{from: from, to: to, pipe: r.pipes[direction], mid: r.mid[direction], carry: r.carry[direction], buf: make([]byte, chunkSize),
		oob: make([]byte, unix.CmsgSpace(maxFDs*4))}
	var place recogniser
	if atomic.LoadUint32(m.mid) != 0 {
		place.state = lost
	}
	left, err := unix.IoctlGetInt(m.pipe.r, unix.TIOCINQ)
	if err != nil {
		return nil, place, os.NewSyscallError("ioctl", err)
	}
	if atomic.LoadUint32(m.carry) != carryNone {
		err = m.finishCarry(left)
	} else {
		err = m.drain(left)
	}
	if err != nil {
		return nil, place, err
	}
	return m, place, nil
}

// ended tells the ends of a connection that are none of our failures: nil.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// A mover moves one direction's bytes.
type mover struct {
	from, to int // blocking sockets
	pipe     pipe
	mid      *uint32
	carry    *uint32
	buf, oob []byte
	// carrier says with which byte from now the next descriptors come, counted from 1. 0: none seen.
	carrier int
}

// look waits for bytes and shows them without taking them away: all that have come, a chunk at most, and no further than
// to a byte that carries descriptors. enough, if there is one, says whether to wait for more.
func (m *mover) look(enough func([]byte) bool) ([]byte, error) {
	for {
		n, err := m.peek()
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, os.NewSyscallError("recvmsg", err)
		case n == 0:
			return nil, io.EOF
		case enough == nil || m.carrier > 0 || enough(m.buf[:n]):
			return m.buf[:n], nil
		}
		// There is no waiting for more than is there already; this is only ever so for a command that came in pieces before
		// the domain's first cont.
		hangup := []unix.PollFd{{Fd: int32(m.from), Events: unix.POLLRDHUP}}
		if k, err := unix.Poll(hangup, 1); k > 0 && err == nil {
			return m.buf[:n], nil
		}
	}
}

// peek waits for bytes, fills the buffer, and finds the first byte that carries descriptors.
func (m *mover) peek() (n int, err error) {
	m.carrier = 0
	n, carries, err := m.peekUpTo(m.buf)
	if err != nil || n == 0 || !carries {
		return n, err
	}
	all := m.buf
	if n == len(all) { // the message with the descriptors may end, or even begin, behind the chunk
		all = make([]byte, maxQueue)
		if n, carries, err = m.peekUpTo(all); err != nil || !carries {
			return 0, err
		}
	}
	m.carrier = bytes.LastIndexByte(all[:n-1], '\n') + 2 // the first byte of the line that is the last
	return min(m.carrier, chunkSize), nil
}

func (m *mover) peekUpTo(buf []byte) (n int, carries bool, err error) {
	n, fds, err := m.receive(buf, unix.MSG_PEEK)
	closeAll(fds)
	return n, len(fds) > 0, err
}

// receive is recvmsg(2) from the source. The descriptors are the caller's, whatever the error says.
func (m *mover) receive(b []byte, flags int) (n int, fds []int, err error) {
	iov := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	header := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: &m.oob[0], Controllen: uint64(len(m.oob))}
	k, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(m.from), uintptr(unsafe.Pointer(&header)), uintptr(flags|unix.MSG_CMSG_CLOEXEC))
	if errno != 0 {
		return 0, nil, errno
	}
	if header.Controllen > 0 {
		fds, err = parseFDs(m.oob[:header.Controllen])
	}
	if err == nil && header.Flags&unix.MSG_CTRUNC != 0 {
		err = errTruncated
	}
	return int(k), fds, err
}

// move takes b, which look has shown, to the other side. seen gets each piece when it can't be lost any more and hasn't
// gone on yet; idle then says whether the stream is between two messages.
func (m *mover) move(b []byte, seen func([]byte), idle func() bool) error {
	for len(b) > 0 {
		atomic.StoreUint32(m.mid, 1)
		n, err := len(b), error(nil)
		switch {
		case m.carrier == 1:
			n = 1
			m.carrier = 0
			err = m.moveCarrier(func() { seen(b[:1]) })
		default:
			if m.carrier > 1 {
				n = min(n, m.carrier-1)
			}
			if n, err = m.fill(n); err == nil {
				if m.carrier > 0 {
					m.carrier -= n
				}
				seen(b[:n])
				err = m.drain(n)
			}
		}
		if err != nil {
			return err
		}
		b = b[n:]
		if idle() {
			atomic.StoreUint32(m.mid, 0)
		}
	}
	return nil
}

// fill moves up to n bytes, which are there, into the pipe, and gives how many.
func (m *mover) fill(n int) (int, error) {
	k, err := splice(m.from, m.pipe.w, n)
	switch {
	case err != nil:
		return 0, os.NewSyscallError("splice", err)
	case k == 0:
		return 0, io.EOF
	}
	return k, nil
}

// drain moves n bytes, which are in the pipe, to the other side. It waits while that doesn't read.
func (m *mover) drain(n int) error {
	for n > 0 {
		k, err := splice(m.pipe.r, m.to, n)
		if err == nil && k == 0 {
			err = io.ErrUnexpectedEOF // the pipe has less than it should
		}
		if err != nil {
			return os.NewSyscallError("splice", err)
		}
		n -= k
	}
	return nil
}

// splice waits for a socket, and never for a pipe: what goes into one is taken out before more goes in.
func splice(from, to, n int) (int, error) {
	for {
		k, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE)
		if !errors.Is(err, unix.EINTR) {
			return int(k), err
		}
	}
}

// moveCarrier moves the one byte that comes next, with its descriptors.
func (m *mover) moveCarrier(seen func()) error {
	var b [1]byte
	_, fds, err := m.receive(b[:], unix.MSG_PEEK)
	defer closeAll(fds)
	if err != nil {
		return err
	}
	seen()
	rights := unix.UnixRights(fds...)
	iov := unix.Iovec{Base: &b[0], Len: 1}
	message := unix.Msghdr{Iov: &iov, Iovlen: 1}
	if len(fds) > 0 {
		message.Control = &rights[0]
		message.SetControllen(len(rights))
	}
	for {
		// A socket that is writable takes one byte more (unix_writable and sock_alloc_send_pskb in the kernel): so
		// what follows the word is one system call that doesn't wait, and with no way out through Go's scheduler before it.
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(m.to), Events: unix.POLLOUT}}, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return os.NewSyscallError("poll", err)
		}
		atomic.StoreUint32(m.carry, carrySent)
		_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(m.to), uintptr(unsafe.Pointer(&message)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errno == 0 {
			break
		}
		atomic.StoreUint32(m.carry, carryNone)
		if errno != unix.EAGAIN && errno != unix.EINTR {
			return os.NewSyscallError("sendmsg", errno)
		}
	}
	runtime.KeepAlive(rights)
	return m.finishCarry(0)
}

// What the word carry says.
const (
	carryNone = 0 // what the pipe holds has to go on
	carrySent = 1 // the source's next byte has gone on, or, if the pipe holds one, that one has
	carryDone = 2 // what the pipe holds has gone on
)

// finishCarry takes away the byte that was sent with descriptors; the pipe holds left bytes.
func (m *mover) finishCarry(left int) error {
	if atomic.LoadUint32(m.carry) == carrySent {
		if left == 0 {
			var err error
			if left, err = m.fill(1); err != nil {
				return err
			}
		}
		atomic.StoreUint32(m.carry, carryDone)
	}
	for left > 0 {
		n, err := unix.Read(m.pipe.r, m.buf[:1])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("read", err)
		}
		left -= max(n, 0)
	}
	atomic.StoreUint32(m.carry, carryNone)
	return nil
}

// discard takes n bytes, which are there, away, with whatever they carry.
func (m *mover) discard(n int) error {
	m.carrier = 0
	for n > 0 {
		k, fds, err := m.receive(m.buf[:min(n, len(m.buf))], 0)
		closeAll(fds)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case k == 0:
			return io.EOF
		}
		n -= k
	}
	return nil
}

// parseFDs collects every descriptor that came, before anything is judged: those it returns are open whatever the
// error says.
func parseFDs(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, os.NewSyscallError("recvmsg", err)
	}
	var all []int
	for i := range messages {
		if messages[i].Header.Level != unix.SOL_SOCKET || messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, perr := unix.ParseUnixRights(&messages[i])
		err = errors.Join(err, perr)
		all = append(all, fds...)
	}
	return all, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
