package relay

import (
	"bytes"
	"errors"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sizes of the relay.
const (
	// chunkSize is how much is looked at and moved at a time. Messages may be of any size: they are never collected.
	chunkSize = 32 << 10
	// maxFDs is what the kernel lets one message carry (SCM_MAX_FD in include/net/scm.h).
	maxFDs = 253
	// maxQueue is more than a unix socket queues: twice net.core.wmem_default, which nobody raises for a monitor.
	maxQueue = 512 << 10
)

// unreadAfter is how long a client may leave unread what is there for it until somebody is told. Meanwhile QEMU's messages fill the
// sockets and the pipe, and then QEMU keeps them, as without a shim. Tests are less patient.
var unreadAfter = 10 * time.Second

// errTruncated is the end of a connection that lost descriptors on the way: this process ran out of them.
var errTruncated = errors.New("file descriptors were lost in a message (MSG_CTRUNC)")

// A mover moves one direction's bytes.
type mover struct {
	Direction
	from, to int // the sockets
	poller   *poller
	buf, oob []byte
	// carrier says with which byte from now the next descriptors come, counted from 1. 0: none seen.
	carrier int
	// unread, if there is one, hears that the other side hasn't taken anything for unreadAfter, and that it does again.
	unread func(bool)

	waits *time.Timer   // for the other side; nil while it takes what comes
	told  chan struct{} // closed when unread has heard

	// What recvmsg(2) is given: here, since on the stack it would be new memory with each message.
	message struct {
		iov    unix.Iovec
		header unix.Msghdr
	}
}

// errNothing says that nothing has come.
var errNothing = errors.New("nothing has come")

// serve has step take what has come, again and again, and waits whenever it says errNothing. Any other error of its ends that.
func (m *mover) serve(step func() error) (err error) {
	werr := m.poller.wait(func() bool {
		for err = nil; err == nil; {
			err = step()
		}
		return err != errNothing
	})
	return errors.Join(werr, err)
}

// taken ends a wait for the other side.
func (m *mover) taken() {
	if m.waits == nil {
		return
	}
	if !m.waits.Stop() {
		<-m.told
		m.unread(false)
	}
	m.waits = nil
}

// splice moves up to n bytes, without waiting.
func splice(from, to, n int) (int, error) {
	k, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE)
	if errno != 0 {
		return 0, errno
	}
	return int(k), nil
}

// look shows bytes without taking them away: all that have come, a chunk at most, and no further than
// to a byte that carries descriptors. enough, if there is one, says whether to wait for more.
func (m *mover) look(enough func([]byte) bool) ([]byte, error) {
	for {
		n, err := m.peek()
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return nil, io.EOF
		case enough == nil || m.carrier > 0 || enough(m.buf[:n]):
			return m.buf[:n], nil
		}
		// There is no waiting for more than is there already; this is only ever so for a command that came in pieces before
		// the domain's first cont.
		if k, err := unix.Poll([]unix.PollFd{{Fd: int32(m.from), Events: unix.POLLRDHUP}}, 1); k > 0 && err == nil {
			return m.buf[:n], nil
		}
	}
}

// peek fills the buffer, and finds the first byte that carries descriptors.
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
	m.message.iov = unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	m.message.header = unix.Msghdr{Iov: &m.message.iov, Iovlen: 1, Control: &m.oob[0], Controllen: uint64(len(m.oob))}
	k, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(m.from), uintptr(unsafe.Pointer(&m.message.header)),
		uintptr(flags|unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT))
	switch errno {
	case 0:
	case unix.EAGAIN:
		return 0, nil, errNothing
	default:
		return 0, nil, os.NewSyscallError("recvmsg", errno)
	}
	if m.message.header.Controllen > 0 {
		fds, err = parseFDs(m.oob[:m.message.header.Controllen])
	}
	if err == nil && m.message.header.Flags&unix.MSG_CTRUNC != 0 {
		err = errTruncated
	}
	return int(k), fds, err
}

// move takes b, which look has shown, to the other side. seen gets each piece when it can't be lost any more and hasn't
// gone on yet; idle then says whether the stream is between two messages.
func (m *mover) move(b []byte, seen func([]byte), idle func() bool) error {
	for len(b) > 0 {
		atomic.StoreUint32(m.Mid, 1)
		n, err := len(b), error(nil)
		switch {
		case m.carrier == 1:
			n = 1
			m.carrier = 0
			if err = m.moveCarrier(func() { seen(b[:1]) }); err == nil && idle() {
				atomic.StoreUint32(m.Mid, 0)
			}
		default:
			if m.carrier > 1 {
				n = min(n, m.carrier-1)
			}
			if n, err = m.fill(n); err == nil {
				if m.carrier > 0 {
					m.carrier -= n
				}
				seen(b[:n])
				if idle() { // a worker that takes over sends what is in the pipe first
					atomic.StoreUint32(m.Mid, 0)
				}
				err = m.drain(n)
			}
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// fill moves up to n bytes, which are there, into the pipe, which is empty, and gives how many.
func (m *mover) fill(n int) (int, error) {
	for {
		k, err := splice(m.from, m.W, n)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // that can't be
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(m.from), Events: unix.POLLIN}}, -1)
		case err != nil:
			return 0, os.NewSyscallError("splice", err)
		case k == 0:
			return 0, io.EOF
		default:
			return k, nil
		}
	}
}

// drain moves n bytes, which are in the pipe, to the other side. It waits while that doesn't read.
func (m *mover) drain(n int) error {
	for n > 0 {
		k, err := splice(m.R, m.to, n)
		if err == unix.EAGAIN {
			k, err = m.drainSlowly(n)
		}
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("splice", err)
		case k == 0:
			return io.ErrUnexpectedEOF // the pipe has less than it should
		}
		n -= k
	}
	return nil
}

// drainSlowly waits until the other side takes some of n bytes, and gives how many.
func (m *mover) drainSlowly(n int) (k int, err error) {
	werr := awaitRoom(m.to, func() bool {
		if k, err = splice(m.R, m.to, n); err != unix.EAGAIN {
			return true
		}
		if left, e := unix.IoctlGetInt(m.R, unix.TIOCINQ); e == nil && left == 0 {
			err = nil // it isn't the socket that is to be waited for
			return true
		}
		if writable(m.to) {
			// It isn't full. Kernels before 6.5 say EAGAIN also for a signal that came while the other side was reading
			// (net/unix/af_unix.c, unix_stream_sendpage), and then nothing may ever make it writable anew.
			err = unix.EINTR
			return true
		}
		if m.unread != nil && m.waits == nil {
			told := make(chan struct{})
			m.told, m.waits = told, time.AfterFunc(unreadAfter, func() {
				m.unread(true)
				close(told)
			})
		}
		return false
	})
	m.taken()
	if werr != nil {
		return 0, werr
	}
	return k, err
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
	for errno := unix.EINTR; errno != 0; {
		if err := awaitRoom(m.to, func() bool {
			// A socket that is writable takes one byte more (unix_writable and sock_alloc_send_pskb in the kernel): so
			// what follows the word is one system call that succeeds, with no way out through Go's scheduler before it.
			if !writable(m.to) {
				return false
			}
			atomic.StoreUint32(m.Carry, carrySent)
			_, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, uintptr(m.to), uintptr(unsafe.Pointer(&message)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if errno != 0 {
				atomic.StoreUint32(m.Carry, carryNone)
			}
			return true
		}); err != nil {
			return err
		}
		if errno != 0 && errno != unix.EINTR && errno != unix.EAGAIN { // it was writable: there is nothing to wait for
			return os.NewSyscallError("sendmsg", errno)
		}
	}
	runtime.KeepAlive(rights)
	return m.finishCarry(0)
}

// writable tells whether a socket takes something, or would say why it never will.
func writable(fd int) bool {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	n, _, errno := unix.RawSyscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&p)), 1, 0)
	return errno == 0 && n > 0
}

// What the word carry says.
const (
	carryNone = 0 // what the pipe holds has to go on
	carrySent = 1 // the source's next byte has gone on, or, if the pipe holds one, that one has
	carryDone = 2 // what the pipe holds has gone on
)

// finishCarry takes away the byte that was sent with descriptors; the pipe holds left bytes.
func (m *mover) finishCarry(left int) error {
	if atomic.LoadUint32(m.Carry) == carrySent {
		if left == 0 {
			var err error
			if left, err = m.fill(1); err != nil {
				return err
			}
		}
		atomic.StoreUint32(m.Carry, carryDone)
	}
	for left > 0 {
		n, err := unix.Read(m.R, m.buf[:1])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("read", err)
		}
		left -= max(n, 0)
	}
	atomic.StoreUint32(m.Carry, carryNone)
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
