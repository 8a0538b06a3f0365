package shim

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/keeper"
)

// libvirt gives a domain up whose connection ends. So it is let go of at no moment in which this process might die.
func TestTheClientIsAlwaysKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	next, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3)
	_ = unix.Close(next)
	if err != nil {
		t.Fatal(err)
	}
	store, err := keeper.Open(func(what string) { t.Error(what) })
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(next) // the store's socket, which a process has for its life
	fd, err := newState()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	state, err := openState(fd)
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{Config: Config{Store: store}, domain: testDomain(t, byDefault), state: state}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[1])
	f := os.NewFile(uintptr(ends[0]), "client")
	defer f.Close()
	client, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	said := make(chan []string)
	go func() { // a socket queues no more than some ten messages
		var all []string
		buf := make([]byte, 256)
		for n, err := manager.Read(buf); err == nil && string(buf[:n]) != "READY=1"; n, err = manager.Read(buf) {
			all = append(all, string(buf[:n]))
		}
		said <- all
	}()
	for range 3 {
		if _, err := s.newRelay(client.(*net.UnixConn)); err == nil { // the domain has no directory
			t.Fatal("QEMU was reached")
		}
	}
	store.Ready()
	defer s.dropRelay()
	kept := 0
	for _, text := range <-said {
		if !strings.Contains(text, "FDNAME="+fdClient) {
			continue
		}
		if kept++; strings.Contains(text, "FDSTOREREMOVE=1") {
			t.Error("it is let go of")
		}
	}
	if kept == 0 {
		t.Error("it isn't kept")
	}
}
