package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sizes of the relay.
const (
	// chunkSize is how much is moved at a time. Messages may be of any size: they are never collected.
	chunkSize = 64 << 10
	// maxFDs is what the kernel lets one message carry (SCM_MAX_FD in include/net/scm.h).
	maxFDs = 253
	// maxHeld bounds what is held back of a command while the first cont is still to be decided upon.
	maxHeld = 64 << 10
)

// errTruncated is the end of a connection that lost file descriptors on the way: this process ran out of them.
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
	observer     observer

	commands recogniser
	held     []byte // of a command, while the gate is closed
	heldFDs  []int

	// mu guards what is written to the client: QEMU's bytes, and between its messages our refusals.
	mu       sync.Mutex
	messages recogniser
	queued   []byte
}

// run moves bytes until both sides have ended. An end of one direction is handed on as such; once QEMU has ended, the
// whole connection has, and the other way round when the client is gone for good.
func (r *relay) run() error {
	var group sync.WaitGroup
	var up, down error
	group.Go(func() {
		up = r.move(r.client, r.toQEMU)
		_ = r.qemu.CloseWrite()
	})
	group.Go(func() {
		down = r.move(r.qemu, r.toClient)
		hangUp(r.client)
	})
	group.Wait()
	closeAll(r.heldFDs)
	_ = r.client.Close()
	_ = r.qemu.Close()
	return errors.Join(up, down)
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

// move reads from one side and hands on, until the end of the stream (nil) or an error.
func (r *relay) move(from *net.UnixConn, on func([]byte, []int) error) error {
	buf := make([]byte, chunkSize)
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	for {
		// Go's ReadMsgUnix sets MSG_CMSG_CLOEXEC.
		n, oobn, flags, _, err := from.ReadMsgUnix(buf, oob)
		fds, cerr := parseFDs(oob[:oobn])
		switch {
		case cerr == nil && flags&unix.MSG_CTRUNC != 0:
			cerr = errTruncated
		case cerr == nil && n == 0 && err == nil:
			err = io.EOF
		}
		if cerr != nil || err != nil {
			closeAll(fds)
			if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
				return cerr
			}
			return errors.Join(cerr, err)
		}
		if err := on(buf[:n], fds); err != nil {
			if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
				return nil // the other side is gone: that is its direction's to tell
			}
			return err
		}
	}
}

// toQEMU hands on what the client sent. The file descriptors go with the first byte they came with.
func (r *relay) toQEMU(b []byte, fds []int) error {
	for len(b) > 0 {
		n, m, ended := r.commands.feed(b)
		part := b[:n]
		b = b[n:]
		isCont := ended && m.execute == "cont"
		if ended && m.execute != "" && !isCont {
			r.observer.command(m)
		}

		if r.observer.gated() || len(r.held) > 0 {
			r.held = append(r.held, part...)
			r.heldFDs = append(r.heldFDs, fds...)
			fds = nil
			if isCont {
				if refusal := r.observer.cont(m); refusal != "" {
					r.held = r.held[:0]
					closeAll(r.heldFDs)
					r.heldFDs = nil
					if err := r.refuse(m.id, refusal); err != nil {
						return err
					}
					continue
				}
			} else if !ended && !r.commands.idle() && !r.commands.isLost() && len(r.held) < maxHeld {
				continue
			}
			err := send(r.qemu, r.held, r.heldFDs)
			r.held, r.heldFDs = nil, nil
			if err != nil {
				return err
			}
			continue
		}

		if isCont {
			if len(part) > 1 {
				err := send(r.qemu, part[:len(part)-1], fds)
				fds = nil
				if err != nil {
					return err
				}
				part = part[len(part)-1:]
			}
			r.observer.cont(m)
		}
		err := send(r.qemu, part, fds)
		fds = nil
		if err != nil {
			return err
		}
	}
	return nil
}

// toClient hands on what QEMU sent.
func (r *relay) toClient(b []byte, fds []int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(b) > 0 {
		n, m, ended := r.messages.feed(b)
		if ended {
			r.observer.fromQEMU(m)
		}
		// Without something of ours to put between, messages go on as they came, in one piece.
		if len(r.queued) == 0 {
			for n < len(b) {
				var more int
				more, m, ended = r.messages.feed(b[n:])
				n += more
				if ended {
					r.observer.fromQEMU(m)
				}
			}
		}
		err := send(r.client, b[:n], fds)
		fds = nil
		if err != nil {
			return err
		}
		b = b[n:]
		if err := r.flush(); err != nil {
			return err
		}
	}
	return nil
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
	return send(r.client, b, nil)
}

// send writes b whole, its first byte with fds, and closes fds.
func send(to *net.UnixConn, b []byte, fds []int) error {
	defer closeAll(fds)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		// One sendmsg: when it is cut short, the descriptors have gone with its first byte.
		n, _, err := to.WriteMsgUnix(b, oob, nil)
		if n > 0 {
			b, oob = b[n:], nil
		}
		if err != nil {
			return err
		}
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
