package relay

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The two directions.
const (
	Up   = 0 // client to QEMU
	Down = 1
)

// The two sockets.
const (
	toClient = 0
	toQEMU   = 1
)

// An Observer sees what a relay recognises, in the stream's order, each direction from its own goroutine.
type Observer interface {
	// Command sees a command that is about to go on to QEMU.
	Command(m Message)
	// Cont sees a cont before QEMU gets its last byte, and may take its time, bounded. A refusal, a single line, is
	// possible only while Holds says so: it goes back to the client, and QEMU never sees the command.
	Cont(m Message) (refusal string)
	// Holds says that a cont may have to wait, or be refused: then it is kept back whole, where a worker that takes over finds it.
	Holds() bool
	// FromQEMU sees a message of QEMU's before the client gets its last byte.
	FromQEMU(m Message)
	// Unread hears that the client hasn't read for a while, or reads again.
	Unread(so bool)
}

// A Direction is what the worker that takes over finds of one: the pipe that the bytes are in between two sockets, and two words in
// memory that outlives this process. All of it stays the caller's.
type Direction struct {
	R, W       int
	Mid, Carry *uint32 // both 0 at a connection's beginning
}

// A Relay moves the bytes and file descriptors of one connection between a client, libvirt, and QEMU.
type Relay struct {
	client, qemu *net.UnixConn
	sockets      [2]int // of the two connections, while it runs
	pollers      [2]*poller
	directions   [2]Direction
	observer     Observer

	begun    chan struct{} // closed when down knows where in QEMU's stream it begins
	mu       sync.Mutex    // of what is written to the client
	toClient clientStream
}

// A clientStream is what is written to the client: QEMU's bytes, and between its messages our refusals.
type clientStream struct {
	queued   []byte
	messages recogniser // QEMU's, as far as they have gone on to the client
}

// New makes a relay for two connections, which Run takes over.
func New(client, qemu *net.UnixConn, directions [2]Direction, o Observer) *Relay {
	return &Relay{client: client, qemu: qemu, directions: directions, observer: o, begun: make(chan struct{})}
}

// Run moves bytes until the connection has ended, as seen from either side, and closes both.
func (r *Relay) Run() error {
	defer r.close()
	if err := Patiently(r.open); err != nil {
		HangUp(r.client)
		return err
	}
	var group sync.WaitGroup
	var errs [2]error
	group.Go(func() {
		errs[Up] = r.up()
		_ = unix.Shutdown(r.sockets[toQEMU], unix.SHUT_WR)
	})
	group.Go(func() {
		errs[Down] = r.down()
		_ = unix.Shutdown(r.sockets[toClient], unix.SHUT_RDWR) // see HangUp
	})
	group.Wait()
	return errors.Join(errs[:]...)
}

// open takes the two sockets out of Go's poller, which would be woken up by each message that the other side reads: there it waits
// for room, too, always.
func (r *Relay) open() error {
	for i, c := range []*net.UnixConn{toClient: r.client, toQEMU: r.qemu} {
		if r.pollers[i] != nil {
			continue
		}
		own, err := Duplicate(c)
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

func (r *Relay) close() {
	_ = r.client.Close()
	_ = r.qemu.Close()
	for i, p := range r.pollers {
		if p != nil {
			p.close()
			_ = unix.Close(r.sockets[i])
		}
	}
}

// HangUp ends both directions at once, as QEMU's own close does: after an end of one only, libvirt doesn't look into QEMU's
// log for the reason (qemu_monitor.c, qemuMonitorIO). It also ends our reading from that side.
func HangUp(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// up moves what the client sends.
func (r *Relay) up() error {
	m, commands, err := r.begin(Up, toClient, toQEMU, nil)
	if err != nil {
		return ended(err)
	}
	enough := func(b []byte) bool { return !r.withheld(&commands, b) }
	tell := func(message Message) {
		if message.Execute == "cont" {
			r.observer.Cont(message)
		} else if message.Execute != "" {
			r.observer.Command(message)
		}
	}
	seen := func(b []byte) { commands.each(b, tell) }
	idle := commands.idle
	return ended(m.serve(func() error {
		look, err := m.look(enough)
		if err != nil {
			return err
		}
		if r.observer.Holds() {
			// One message at a time.
			ahead := commands
			if n, message, complete := ahead.feed(look); complete {
				look = look[:n]
				if commands.idle() && message.Execute == "cont" {
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
func (r *Relay) withheld(commands *recogniser, b []byte) bool {
	if !r.observer.Holds() || !commands.idle() || len(b) == chunkSize {
		return false
	}
	ahead := *commands
	_, _, complete := ahead.feed(b)
	return !complete && !ahead.idle() && !ahead.isLost()
}

// hold has the observer decide upon a cont, which is there as a whole, n bytes, of which QEMU has had none.
func (r *Relay) hold(m *mover, cont Message, n int) error {
	if refusal := r.observer.Cont(cont); refusal != "" {
		if err := r.refuse(cont.ID, refusal); err != nil {
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

// down moves what QEMU sends.
func (r *Relay) down() error {
	m, messages, err := r.begin(Down, toQEMU, toClient, r.observer.Unread)
	to := &r.toClient
	to.messages = messages
	close(r.begun)
	if err != nil {
		return ended(err)
	}
	seen := func(b []byte) { to.messages.each(b, r.observer.FromQEMU) }
	idle := to.messages.idle
	return ended(m.serve(func() error {
		look, err := m.look(nil)
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(to.queued) > 0 { // as far as the end of the message that ours is to be put behind
			ahead := to.messages
			if n, _, complete := ahead.feed(look); complete {
				look = look[:n]
			}
		}
		if err := m.move(look, seen, idle); err != nil {
			return err
		}
		return to.flush(r.sockets[toClient])
	}))
}

// refuse answers a command in QEMU's place, as soon as QEMU isn't in the middle of a message.
func (r *Relay) refuse(id, reason string) error {
	desc, err := json.Marshal(reason)
	if err != nil {
		return fmt.Errorf("wording a refusal: %w", err)
	}
	answer := ""
	if id != "" {
		answer = `"id": ` + id + `, `
	}
	answer = "{" + answer + `"error": {"class": "GenericError", "desc": ` + string(desc) + "}}\r\n"
	<-r.begun
	r.mu.Lock()
	defer r.mu.Unlock()
	r.toClient.queued = append(r.toClient.queued, answer...)
	return r.toClient.flush(r.sockets[toClient])
}

// flush writes what is queued to the client's socket, between two messages.
func (c *clientStream) flush(socket int) error {
	if len(c.queued) == 0 || !c.messages.idle() {
		return nil
	}
	b := c.queued
	c.queued = nil
	for len(b) > 0 {
		n, err := unix.SendmsgN(socket, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(socket), Events: unix.POLLOUT}}, -1)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// begin makes a direction's mover, sends what the last worker had under way, and finds the recogniser's place.
func (r *Relay) begin(direction int, from, to int, unread func(bool)) (*mover, recogniser, error) {
	var place recogniser
	m := &mover{
		from: r.sockets[from], to: r.sockets[to], Direction: r.directions[direction], poller: r.pollers[from], unread: unread,
		buf: make([]byte, chunkSize), oob: make([]byte, unix.CmsgSpace(maxFDs*4)),
	}
	if atomic.LoadUint32(m.Mid) != 0 {
		place.state = lost
	}
	left, err := unix.IoctlGetInt(m.R, unix.TIOCINQ)
	if err != nil {
		return nil, place, os.NewSyscallError("ioctl", err)
	}
	if atomic.LoadUint32(m.Carry) != carryNone {
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

// connectWait bounds how long a client's connection waits for descriptors or memory that the host is short of.
const connectWait = 5 * time.Second

// Patiently tries again while what is lacking may come back: libvirt gives up a domain whose connection ends.
func Patiently(try func() error) error {
	for end := time.Now().Add(connectWait); ; time.Sleep(100 * time.Millisecond) {
		if err := try(); err == nil || time.Now().After(end) || !scarce(err) {
			return err
		}
	}
}

// scarce says whether an error is of something that the host is short of: descriptors, memory, room in a socket's backlog.
func scarce(err error) bool {
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EAGAIN} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// Duplicate gives another descriptor of a socket, which is the caller's.
func Duplicate(socket syscall.Conn) (own int, err error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(fd uintptr) { own, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err = errors.Join(cerr, err); err != nil {
		return -1, err
	}
	return own, nil
}
