package shim

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"ftclock/relay"
)

// reopen duplicates a descriptor of the store's.
func reopen(fd int) (*os.File, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(own), "kept"), nil
}

// keep puts a duplicate of a socket's descriptor into the store.
func (s *shim) keep(name string, socket syscall.Conn) error {
	own, err := relay.Duplicate(socket)
	if err != nil {
		return err
	}
	s.Store.Put(name, own)
	return nil
}

// kept gives a duplicate of a descriptor of the store's; nil if there is none of that name.
func (s *shim) kept(name string) *os.File {
	fd, ok := s.Store.Get(name)
	if !ok {
		return nil
	}
	f, err := reopen(fd)
	if err != nil {
		return nil
	}
	return f
}

// keptListener and keptConn make a socket of the store's usable; nil if there is none of that name.
func (s *shim) keptListener(name string) *net.UnixListener {
	f := s.kept(name)
	if f == nil {
		return nil
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil
	}
	listener, _ := l.(*net.UnixListener)
	return listener
}

func (s *shim) keptConn(name string) *net.UnixConn {
	f := s.kept(name)
	if f == nil {
		return nil
	}
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	conn, _ := c.(*net.UnixConn)
	return conn
}
