package shim

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/relay"
)

// bind takes the place of libvirt's socket. Addresses go through the open directory: that keeps them short, and
// QEMU's user, to whom the directory belongs, can't lead us elsewhere.
func (s *shim) bind() error {
	if s.socket = kept[*net.UnixListener](s, fdMonitor, net.FileListener); s.socket != nil {
		return nil
	}
	if dir, begun := s.Store.Get(fdDir); !begun {
		fd, err := unix.Open(s.DomainDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening the domain's directory %s: %w", s.DomainDir, err)
		}
		s.Store.Put(fdDir, fd)
	} else if unix.Faccessat(dir, control.QEMUSocket, unix.F_OK, 0) == nil {
		_ = unix.Unlinkat(dir, control.MonitorSocket, 0) // of a worker that died between binding and keeping it
	}
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.address(control.MonitorSocket), Net: "unix"})
	if err != nil {
		return fmt.Errorf("listening on %s in %s: %w", control.MonitorSocket, s.DomainDir, err)
	}
	socket.SetUnlinkOnClose(false)
	s.domain.notes.change(func(m *memory) { m.Monitor = s.monitorInode() })
	if err := s.keep(fdMonitor, socket); err != nil {
		return err
	}
	s.socket = socket
	return nil
}

// monitorInode tells the file that is monitor.sock now from any other; 0 if there is none.
func (s *shim) monitorInode() uint64 {
	fd, ok := s.Store.Get(fdDir)
	var st unix.Stat_t
	if !ok || unix.Fstatat(fd, control.MonitorSocket, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return 0
	}
	return st.Ino
}

func (s *shim) address(name string) string {
	fd, _ := s.Store.Get(fdDir)
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
}

// unbind removes what was bound. QEMU or libvirt may have removed it already, with its directory; and a hook that gave
// a start up may have put libvirt's own socket back.
func (s *shim) unbind() {
	_ = s.socket.Close()
	if fd, ok := s.Store.Get(fdDir); ok && s.monitorInode() == s.domain.notes.read().Monitor {
		_ = unix.Unlinkat(fd, control.MonitorSocket, 0)
	}
	s.Store.Drop(fdMonitor)
}

// removeQEMUSocket removes what QEMU listened on. libvirt does it with the whole directory, unless its daemon ended before QEMU.
func (s *shim) removeQEMUSocket() {
	if fd, ok := s.Store.Get(fdDir); ok {
		_ = unix.Unlinkat(fd, control.QEMUSocket, 0)
	}
}

// serveMonitor relays one connection after the other, the first of which may be an earlier worker's, r.
func (s *shim) serveMonitor(r *relay.Relay) {
	for {
		if r == nil {
			client, err := s.socket.AcceptUnix()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				s.Log.Error().Err(err).Msg("accepting libvirt's connection, trying again; if it lasts, raise the host's limits on open files and memory")
				time.Sleep(100 * time.Millisecond) // out of descriptors or memory: it may pass
				continue
			}
			if r = s.connect(client); r == nil {
				continue
			}
			s.domain.connected()
			s.relays <- struct{}{}
		}
		s.Log.Info().Msg("monitor connected")
		err := r.Run()
		s.dropRelay()
		<-s.relays
		r = nil
		s.Log.Info().Err(err).Msg("monitor disconnected")
	}
}

// connect begins a relay for a client; nil where QEMU can't be reached, and then it is hung up on.
func (s *shim) connect(client *net.UnixConn) (r *relay.Relay) {
	err := relay.Patiently(func() (err error) {
		r, err = s.newRelay(client)
		return err
	})
	if err != nil {
		s.Log.Error().Err(err).Msg("connecting to QEMU's monitor; if the domain runs, restart libvirt's daemon, which connects again")
		relay.HangUp(client)
		_ = client.Close()
		s.dropRelay()
	}
	return r
}

// newRelay connects to QEMU for a new client. Everything is in the store when it returns.
func (s *shim) newRelay(client *net.UnixConn) (*relay.Relay, error) {
	// It is there already where this is tried again, or a worker died meanwhile: to put it anew would let go of it for a moment.
	if _, held := s.Store.Get(fdClient); !held {
		if err := s.keep(fdClient, client); err != nil {
			return nil, err
		}
	}
	for direction, names := range fdPipes {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return nil, os.NewSyscallError("pipe2", err)
		}
		for i, fd := range ends {
			s.Store.Put(names[i], fd)
		}
		atomic.StoreUint32(s.state.mid(direction), 0)
		atomic.StoreUint32(s.state.carry(direction), 0)
	}
	qemu, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.address(control.QEMUSocket), Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := s.keep(fdQEMU, qemu); err != nil {
		_ = qemu.Close()
		return nil, err
	}
	return s.relay(client, qemu), nil
}

// oldRelay goes on with an earlier worker's connection; nil if there is none.
func (s *shim) oldRelay() *relay.Relay {
	client, qemu := kept[*net.UnixConn](s, fdClient, net.FileConn), kept[*net.UnixConn](s, fdQEMU, net.FileConn)
	switch {
	case client == nil:
		if qemu != nil { // it died while it dropped a connection that had ended
			_ = qemu.Close()
		}
		s.dropRelay()
		return nil
	case qemu == nil: // it died between the two
		return s.connect(client)
	}
	return s.relay(client, qemu)
}

func (s *shim) relay(client, qemu *net.UnixConn) *relay.Relay {
	var directions [2]relay.Direction
	for i, names := range fdPipes {
		d := &directions[i]
		d.R, _ = s.Store.Get(names[0])
		d.W, _ = s.Store.Get(names[1])
		d.Mid, d.Carry = s.state.mid(i), s.state.carry(i)
	}
	return relay.New(client, qemu, directions, s.domain)
}

func (s *shim) dropRelay() {
	for _, name := range slices.Concat([]string{fdClient, fdQEMU}, fdPipes[relay.Up][:], fdPipes[relay.Down][:]) {
		s.Store.Drop(name)
	}
}

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

// kept makes a socket of the store's usable, by what package net makes of a file; nil if there is none of that name.
func kept[S *net.UnixListener | *net.UnixConn, Any any](s *shim, name string, of func(*os.File) (Any, error)) (socket S) {
	fd, ok := s.Store.Get(name)
	if !ok {
		return nil
	}
	f, err := reopen(fd)
	if err != nil {
		return nil
	}
	defer f.Close()
	if found, err := of(f); err == nil {
		socket, _ = any(found).(S)
	}
	return socket
}
