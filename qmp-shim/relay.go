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
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

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

// The two sockets.
const (
	toClient = 0
	toQEMU   = 1
)

// unreadAfter is how long a client may leave unread what is there for it until somebody is told. Meanwhile QEMU's messages fill the
// sockets and the pipe, and then QEMU keeps them, as without a shim. Tests are less patient.
var unreadAfter = 10 * time.Second

// errTruncated is the end of a connection that lost descriptors on the way: this process ran out of them.
var errTruncated = errors.New("file descriptors were lost in a message (MSG_CTRUNC)")

// An observer sees what a relay recognises, in the stream's order, each direction from its own goroutine.
type observer interface {
	// command sees a command that is about to go on to QEMU.
	command(m message)
	// cont sees a cont before QEMU gets its last byte, and may take its time, bounded. A refusal, a single line, is
	// possible only while holds says so: it goes back to the client, and QEMU never sees the command.
	cont(m message) (refusal string)
	// holds says that a cont may have to wait, or be refused: then it is kept back whole, where a worker that takes over finds it.
	holds() bool
	// fromQEMU sees a message of QEMU's before the client gets its last byte.
	fromQEMU(m message)
	// unread hears that the client hasn't read for a while, or reads again.
	unread(so bool)
}

// A relay moves the bytes and file descriptors of one connection between a client, libvirt, and QEMU.
type relay struct {
	client, qemu *net.UnixConn
	sockets      [2]int // of the two connections, while it runs
	pollers      [2]*poller
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

// run moves bytes until the connection has ended, as seen from either side. It takes both connections over.
func (r *relay) run() error {
	defer r.close()
	if err := patiently(r.open); err != nil {
		hangUp(r.client)
		return err
	}
	var group sync.WaitGroup
	var errs [2]error
	r.mu.Lock() // until down knows where in QEMU's stream it begins
	group.Go(func() {
		errs[up] = r.up()
		_ = unix.Shutdown(r.sockets[toQEMU], unix.SHUT_WR)
	})
	group.Go(func() {
		errs[down] = r.down()
		_ = unix.Shutdown(r.sockets[toClient], unix.SHUT_RDWR) // see hangUp
	})
	group.Wait()
	return errors.Join(errs[:]...)
}

// open takes the two sockets out of Go's poller, which would be woken up by each message that the other side reads: there it waits
// for room, too, always.
func (r *relay) open() error {
	for i, c := range []*net.UnixConn{toClient: r.client, toQEMU: r.qemu} {
		if r.pollers[i] != nil {
			continue
		}
		own, err := duplicate(c)
		if err != nil {
			return err
		}
		p, err := newPoller(own, unix.EPOLLIN|unix.EPOLLRDHUP)
		if err != nil {
			_ = unix.Close(own)
			return err
		}
		r.sockets[i], r.pollers[i] = own, p
	}
	_ = r.client.Close()
	_ = r.qemu.Close()
	return nil
}

func (r *relay) close() {
	for i, p := range r.pollers {
		if p != nil {
			p.close()
			_ = unix.Close(r.sockets[i])
		}
	}
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
func (r *relay) up() error {
	m, commands, err := r.begin(up, toClient, toQEMU, nil)
	if err != nil {
		return ended(err)
	}
	enough := func(b []byte) bool { return !r.withheld(&commands, b) }
	tell := func(message message) {
		if message.execute == "cont" {
			r.observer.cont(message)
		} else if message.execute != "" {
			r.observer.command(message)
		}
	}
	seen := func(b []byte) { commands.each(b, tell) }
	idle := commands.idle
	return ended(m.serve(func() error {
		look, err := m.look(enough)
		if err != nil {
			return err
		}
		if r.observer.holds() {
			// One message at a time.
			ahead := commands
			if n, message, complete := ahead.feed(look); complete {
				look = look[:n]
				if commands.idle() && message.execute == "cont" {
					return r.hold(m, message, n)
				}
			}
		}
		// A cont is seen when it is in the pipe, with what came with it: QEMU gets none of it before. (So for a stop and a cont in one
		// piece there is no order, and the standing policy serves.)
		return m.move(look, seen, idle)
	}))
}

// withheld says that b, all that has come, isn't enough to tell whether it begins with a cont that is to be held.
func (r *relay) withheld(commands *recogniser, b []byte) bool {
	if !r.observer.holds() || !commands.idle() || len(b) == chunkSize {
		return false
	}
	ahead := *commands
	_, _, complete := ahead.feed(b)
	return !complete && !ahead.idle() && !ahead.isLost()
}

// hold has the observer decide upon a cont, which is there as a whole, n bytes, of which QEMU has had none.
func (r *relay) hold(m *mover, cont message, n int) error {
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
		if err := m.move(look[:min(n, len(look))], func(b []byte) { n -= len(b) }, func() bool { return n == 0 }); err != nil {
			return err
		}
	}
	return nil
}

// down moves what QEMU sends. The caller has taken r.mu for it.
func (r *relay) down() error {
	m, messages, err := r.begin(down, toQEMU, toClient, r.observer.unread)
	r.messages = messages
	r.mu.Unlock()
	if err != nil {
		return ended(err)
	}
	seen := func(b []byte) { r.messages.each(b, r.observer.fromQEMU) }
	idle := r.messages.idle
	return ended(m.serve(func() error {
		look, err := m.look(nil)
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.queued) > 0 { // as far as the end of the message that ours is to be put behind
			ahead := r.messages
			if n, _, complete := ahead.feed(look); complete {
				look = look[:n]
			}
		}
		if err := m.move(look, seen, idle); err != nil {
			return err
		}
		return r.flush()
	}))
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
	if len(r.queued) == 0 || !r.messages.idle() {
		return nil
	}
	b := r.queued
	r.queued = nil
	for len(b) > 0 {
		n, err := unix.SendmsgN(r.sockets[toClient], b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(r.sockets[toClient]), Events: unix.POLLOUT}}, -1)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// begin makes a direction's mover, sends what the last worker had under way, and finds the recogniser's place.
func (r *relay) begin(direction int, from, to int, unread func(bool)) (*mover, recogniser, error) {
	var place recogniser
	m := &mover{
		from: r.sockets[from], to: r.sockets[to], pipe: r.pipes[direction], poller: r.pollers[from],
		mid: r.mid[direction], carry: r.carry[direction], unread: unread,
		buf: make([]byte, chunkSize), oob: make([]byte, unix.CmsgSpace(maxFDs*4)),
	}
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
	from, to int // the sockets
	poller   *poller
	pipe     pipe
	mid      *uint32
	carry    *uint32
	buf, oob []byte
	// carrier says with which byte from now the next descriptors come, counted from 1. 0: none seen.
	carrier int
	// unread, if there is one, hears that the other side hasn't taken anything for unreadAfter, and that it does again.
	unread func(bool)

	waits *time.Timer   // for the other side; nil while it takes what comes
	told  chan struct{} // closed when unread has heard

	// What recvmsg is asked: here, since on the stack it would be new memory with each message.
	ask struct {
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
	m.ask.iov = unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	m.ask.header = unix.Msghdr{Iov: &m.ask.iov, Iovlen: 1, Control: &m.oob[0], Controllen: uint64(len(m.oob))}
	k, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(m.from), uintptr(unsafe.Pointer(&m.ask.header)),
		uintptr(flags|unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT))
	switch errno {
	case 0:
	case unix.EAGAIN:
		return 0, nil, errNothing
	default:
		return 0, nil, os.NewSyscallError("recvmsg", errno)
	}
	if m.ask.header.Controllen > 0 {
		fds, err = parseFDs(m.oob[:m.ask.header.Controllen])
	}
	if err == nil && m.ask.header.Flags&unix.MSG_CTRUNC != 0 {
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
			if err = m.moveCarrier(func() { seen(b[:1]) }); err == nil && idle() {
				atomic.StoreUint32(m.mid, 0)
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
					atomic.StoreUint32(m.mid, 0)
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
		k, err := splice(m.from, m.pipe.w, n)
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
		k, err := splice(m.pipe.r, m.to, n)
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
		if k, err = splice(m.pipe.r, m.to, n); err != unix.EAGAIN {
			return true
		}
		if left, e := unix.IoctlGetInt(m.pipe.r, unix.TIOCINQ); e == nil && left == 0 {
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
			atomic.StoreUint32(m.carry, carrySent)
			_, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, uintptr(m.to), uintptr(unsafe.Pointer(&message)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if errno != 0 {
				atomic.StoreUint32(m.carry, carryNone)
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
