package relay

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A poller lets a goroutine wait for one thing of one socket. Go's own poller waits for room, too, and so is woken up each time that the
// other side has read what it was sent. Here it gets an epoll file, which waits for what is asked for.
type poller struct {
	file *os.File
	raw  syscall.RawConn
}

func newPoller(socket int, events uint32) (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, socket, &unix.EpollEvent{Events: events})
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that os.NewFile gives it to Go's poller
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	p := &poller{file: os.NewFile(uintptr(fd), "poller")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *poller) close() { _ = p.file.Close() }

// wait calls try until it is true: first now, then each time that something new has happened.
func (p *poller) wait(try func() bool) error {
	return p.raw.Read(func(uintptr) bool { return try() })
}

// awaitRoom calls try until it is true: first now, then each time that there is room in the socket.
func awaitRoom(socket int, try func() bool) error {
	if try() {
		return nil
	}
	p, err := newPoller(socket, unix.EPOLLOUT)
	if err == nil {
		defer p.close()
		return p.wait(try)
	}
	for !try() { // out of descriptors or memory: a thread waits
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(socket), Events: unix.POLLOUT}}, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
	}
	return nil
}
