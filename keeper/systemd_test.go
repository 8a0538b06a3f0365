package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A systemd is a fake of what a unit's main process sees of it: a socket to tell it by, and the descriptors that it holds.
type systemd struct {
	t       *testing.T
	program string
	socket  int
	path    string
	orders  int
	held    map[string]*os.File
	process *exec.Cmd
}

func newSystemd(t *testing.T) *systemd {
	t.Helper()
	t.Chdir(t.TempDir()) // a socket's address is short; the directory of a test may not be
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &systemd{t: t, program: self, path: "notify", held: make(map[string]*os.File)}
	if s.socket, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := errors.Join(unix.Bind(s.socket, &unix.SockaddrUnix{Name: s.path}),
		unix.SetsockoptTimeval(s.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.process.Process.Kill()
		_ = s.process.Wait()
		_ = unix.Close(s.socket)
		_ = unix.Close(s.orders)
		for _, f := range s.held {
			f.Close()
		}
	})
	return s
}

// start starts the main process, as sd_listen_fds_with_names(3) has it.
func (s *systemd) start() {
	s.t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "orders")
	defer theirs.Close()
	_ = unix.Close(s.orders)
	s.orders = ends[0]
	// LISTEN_PID is the process's own: a shell has it.
	s.process = exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0" -worker`, s.program)
	names := []string{"orders"}
	s.process.ExtraFiles = []*os.File{theirs}
	for name, f := range s.held {
		names = append(names, name)
		s.process.ExtraFiles = append(s.process.ExtraFiles, f)
	}
	s.process.Env = append(append(os.Environ(), Passed(names)...), envNotify+"="+s.path)
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *systemd) ask(order string) string {
	s.t.Helper()
	buf := make([]byte, 256)
	_, err := unix.Write(s.orders, []byte(order))
	if err == nil {
		var n int
		if n, err = unix.Read(s.orders, buf); err == nil {
			return string(buf[:n])
		}
	}
	s.t.Fatalf("%s: %v", order, err)
	return ""
}

// told takes one message.
func (s *systemd) told(want string) {
	s.t.Helper()
	buf, oob := make([]byte, 256), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(s.socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if got := string(buf[:max(n, 0)]); err != nil || got != want {
		s.t.Fatalf("told %q, %v; not %q", got, err, want)
	}
	_, name, _ := strings.Cut(want, "FDNAME=")
	name, _, _ = strings.Cut(name, "\n")
	if strings.HasPrefix(want, "FDSTOREREMOVE") {
		s.held[name].Close()
		delete(s.held, name)
	}
	if oobn > 0 {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			s.t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			s.t.Fatalf("with %v, %v", fds, err)
		}
		s.held[name] = os.NewFile(uintptr(fds[0]), name)
	}
}

func TestUnderSystemd(t *testing.T) {
	s := newSystemd(t)
	s.start()
	s.ask("put a")
	s.told("FDSTORE=1\nFDNAME=a\nFDPOLL=0")
	s.ask("put b")
	s.told("FDSTORE=1\nFDNAME=b\nFDPOLL=0")
	s.ask("put a'") // in the place of a
	s.told("FDSTOREREMOVE=1\nFDNAME=a")
	s.told("FDSTORE=1\nFDNAME=a\nFDPOLL=0")
	s.ask("drop b")
	s.told("FDSTOREREMOVE=1\nFDNAME=b")
	s.ask("ready")
	s.told("READY=1")
	check := func() {
		t.Helper()
		for order, want := range map[string]string{"get a": "/memfd:a' (deleted)", "get b": "none", "pids": fmt.Sprint(s.process.Process.Pid, " 0")} {
			if got := s.ask(order); got != want {
				t.Errorf("%s: %s, not %s", order, got, want)
			}
		}
	}
	check()
	for range 2 {
		_ = s.process.Process.Kill()
		_ = s.process.Wait()
		s.start()
		check()
		// In place, and once more: the numbers are others each time.
		for range 3 {
			if _, err := unix.Write(s.orders, []byte("upgrade")); err != nil {
				t.Fatal(err)
			}
			check()
		}
	}
	s.ask("done")
	s.told("STOPPING=1")
}
