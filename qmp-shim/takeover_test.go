package shim

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/keeper"
	"ftclock/test/fds"
)

func TestMain(m *testing.M) { os.Exit(fds.Run(m)) }

func newStore(t *testing.T) *keeper.Store {
	t.Helper()
	store, err := keeper.Open(func(what string) { t.Error(what) })
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// A worker may die after it has bound the monitor's socket, and before anybody but it has that. The next one binds it anew.
func TestASocketThatNobodyHasIsBoundAnew(t *testing.T) {
	for _, renamed := range []bool{true, false} {
		store := newStore(t)
		dir := t.TempDir()
		files := []string{control.MonitorSocket}
		if renamed {
			files = append(files, control.QEMUSocket)
		}
		for _, name := range files {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			_ = l.Close()
		}
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		store.Put(fdDir, fd)
		s := &shim{Config: Config{DomainDir: dir, Store: store, Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
		err = s.bind()
		if (err == nil) != renamed { // without QEMU's socket it may be libvirt's own
			t.Errorf("QEMU's socket is there %v: %v", renamed, err)
		}
		if err == nil {
			if conn, err := net.Dial("unix", filepath.Join(dir, control.MonitorSocket)); err != nil {
				t.Error(err)
			} else {
				_ = conn.Close()
			}
			s.unbind()
		}
		store.Drop(fdDir)
	}
}

// Requests that can't be answered, as where a disk hangs, don't take the descriptors that the monitor needs.
func TestRequestsAreBounded(t *testing.T) {
	before := len(fds.Open())
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{Config: Config{Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.serveControl(l)
	}()
	var held []net.Conn
	for range maxRequests {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn) // and says nothing
	}
	hungUp := func() bool {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = conn.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	for end := time.Now().Add(2 * time.Minute); !hungUp(); {
		if time.Now().After(end) {
			t.Fatal("one more is taken")
		}
	}
	_ = held[0].Close()
	defer func() {
		for _, conn := range held {
			_ = conn.Close()
		}
		for end := time.Now().Add(2 * time.Minute); len(fds.Open()) > before && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // the other ends
		}
	}()
	for end := time.Now().Add(2 * time.Minute); hungUp(); {
		if time.Now().After(end) {
			t.Fatal("none is taken any more")
		}
	}
	_ = l.Close()
	<-ended
}

// Who publishes the domain's anchor tells the shim, and the status has it.
func TestThePublishedAnchorIsInTheStatus(t *testing.T) {
	store := newStore(t)
	s := &shim{Config: Config{Store: store, Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
	published := func() time.Time {
		t.Helper()
		answer := s.answer(control.Request{Do: "policy", Clock: byDefault})
		if answer.Error != "" {
			t.Fatal(answer.Error)
		}
		return answer.Status.Published
	}
	if at := published(); !at.IsZero() {
		t.Errorf("before: %v", at)
	}
	before := time.Now()
	if answer := s.answer(control.Request{Do: "published"}); answer.Error != "" {
		t.Fatal(answer.Error)
	}
	if at := published(); at.Before(before) || at.After(time.Now()) {
		t.Errorf("after: %v", at)
	}
}

// What a worker of another version left, or one that died at its first breath, is begun anew; but a domain that runs isn't left, and
// never refused a cont.
func TestAStateThatCannotBeReadIsBegunAnew(t *testing.T) {
	for what, began := range map[string]bool{"empty": false, "another version's": true} {
		store := newStore(t)
		fd, err := newState()
		if err != nil {
			t.Fatal(err)
		}
		if began {
			head := binary.LittleEndian.AppendUint64(nil, stateMagic)
			if _, err := unix.Pwrite(fd, append(head, 99), 0); err != nil {
				t.Fatal(err)
			}
		}
		store.Put(fdState, fd)
		required := `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="yes"/>`
		s := &shim{Config: Config{Store: store, Log: zerolog.Nop(), Clock: required, DomainDir: "/"}}
		if err := s.remember(); err != nil {
			t.Fatal(err)
		}
		if m := s.domain.notes.read(); m.Began != began || m.Gate || s.domain.module.gate {
			t.Errorf("%s: %+v, gate %t", what, m, s.domain.module.gate)
		}
		store.Drop(fdState)
	}
}
