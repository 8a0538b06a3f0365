package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/test/check"
	"ftclock/test/endings"
)

// patience bounds every wait for something that has to come.
const patience = 2 * time.Minute

// A kept is a pair that runs.
type kept struct {
	t       *testing.T
	orders  int
	program string
	log     string
	first   *exec.Cmd
}

func startKept(t *testing.T) *kept {
	t.Helper()
	dir := t.TempDir()
	self := check.Value(os.Executable())(t)
	k := &kept{t: t, program: filepath.Join(dir, "program"), log: filepath.Join(dir, "log")}
	check.NoError(t, os.Symlink(self, k.program))
	ends := check.Value(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0))(t)
	k.orders = ends[0]
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	check.NoError(t, unix.SetsockoptTimeval(k.orders, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
	theirs := os.NewFile(uintptr(ends[1]), "orders")
	log := check.Value(os.Create(k.log))(t)
	k.first = exec.Command(k.program, Flag, "-worker")
	k.first.Env = append(os.Environ(), Passed([]string{"orders"})...)
	k.first.ExtraFiles = []*os.File{theirs}
	k.first.Stdout, k.first.Stderr = log, log
	err := k.first.Start()
	theirs.Close()
	log.Close()
	check.NoError(t, err)
	t.Cleanup(func() {
		_ = unix.Close(k.orders)
		if left := endings.Kill(k.processes, patience); len(left) > 0 {
			t.Errorf("they don't end: %v", left)
		}
		_ = k.first.Wait()
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 && !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	return k
}

func (k *kept) hear() string {
	k.t.Helper()
	buf := make([]byte, 256)
	for {
		n, err := unix.Read(k.orders, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			text, _ := os.ReadFile(k.log)
			k.t.Fatalf("the worker is silent: %v\n%s", err, text)
		}
		return string(buf[:n])
	}
}

func (k *kept) ask(order string) string {
	k.t.Helper()
	check.Value(unix.Write(k.orders, []byte(order)))(k.t)
	return k.hear()
}

func (k *kept) want(order, answer string) {
	k.t.Helper()
	if got := k.ask(order); got != answer {
		k.t.Fatalf("%s: %s, not %s", order, got, answer)
	}
}

func (k *kept) pids() (worker, keeper int) {
	k.t.Helper()
	check.Value(fmt.Sscan(k.ask("pids"), &worker, &keeper))(k.t)
	return worker, keeper
}

// processes are all that run the program.
func (k *kept) processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if args, err := os.ReadFile("/proc/" + e.Name() + "/cmdline"); err == nil && strings.HasPrefix(string(args), k.program+"\x00") {
			pid, _ := strconv.Atoi(e.Name())
			pids = append(pids, pid)
		}
	}
	return pids
}

func (k *kept) eventually(what string, holds func() bool) {
	k.t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			text, _ := os.ReadFile(k.log)
			k.t.Fatalf("in vain waited for: %s\n%s", what, text)
		}
	}
}

func (k *kept) killWorker() {
	k.t.Helper()
	old, keeper := k.pids()
	_ = unix.Kill(old, unix.SIGKILL)
	k.eventually("another worker", func() bool { return gone(old) })
	if worker, now := k.pids(); worker == old || now != keeper {
		k.t.Fatalf("worker %d and keeper %d follow %d and %d", worker, now, old, keeper)
	}
}

func (k *kept) killKeeper() {
	k.t.Helper()
	worker, old := k.pids()
	_ = unix.Kill(old, unix.SIGKILL)
	k.eventually("another keeper", func() bool { _, now := k.pids(); return now != old })
	if now, _ := k.pids(); now != worker {
		k.t.Fatalf("the worker is %d, was %d", now, worker)
	}
}

// gone says that a process has ended with its last thread: until then it might still take an order.
func gone(pid int) bool {
	_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // it may have come to us
	_, err := os.Stat(fmt.Sprint("/proc/", pid))
	return err != nil
}

func open(pid int) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries)
}

// watched is how many processes one watches, by their pidfds.
func watched(pid int) (n int) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if target, _ := os.Readlink(filepath.Join(dir, e.Name())); strings.Contains(target, "pidfd") {
			n++
		}
	}
	return n
}

func TestDescriptorsOutliveBoth(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	k.want("put b", "ok")
	k.want("put a'", "ok") // in the place of a
	k.want("drop b", "ok")
	k.want("put c", "ok")
	held := func() {
		t.Helper()
		k.want("get a", "/memfd:a' (deleted)")
		k.want("get b", "none")
		k.want("get c", "/memfd:c (deleted)")
	}
	held()
	k.killWorker()
	held()
	k.killKeeper()
	held()
	k.killWorker() // by a keeper that a worker started
	held()
	k.want("put late", "ok") // a worker that a later keeper started reaches it
	k.killWorker()
	k.want("get late", "/memfd:late (deleted)")
	held()
}

func TestAPutJustBeforeDeathIsKept(t *testing.T) {
	k := startKept(t)
	for i := range 20 {
		worker, _ := k.pids()
		name := fmt.Sprint("n", i%5)
		k.want("put "+name, "ok")
		_ = unix.Kill(worker, unix.SIGKILL)
		k.eventually("the worker's end", func() bool { return gone(worker) })
		k.want("get "+name, "/memfd:"+name+" (deleted)")
	}
}

func TestNothingLeaks(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	k.killKeeper()
	k.killWorker()
	worker, keeper := k.pids()
	k.eventually("both watching who is there", func() bool { return watched(worker) == 1 && watched(keeper) == 2 })
	before := [2]int{open(worker), open(keeper)}
	for range 5 {
		k.killKeeper()
		k.want("put x", "ok")
		k.want("put x'", "ok")
		k.killWorker()
		k.want("drop x", "ok")
	}
	worker, keeper = k.pids()
	k.eventually(fmt.Sprint("as few descriptors as before: ", before), func() bool {
		return open(worker) <= before[0] && open(keeper) <= before[1]
	})
	k.eventually("the dead being buried", func() bool {
		for _, parent := range []int{worker, keeper} {
			children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", parent, parent))
			for _, child := range strings.Fields(string(children)) {
				if pid, _ := strconv.Atoi(child); pid != worker && pid != keeper {
					return false
				}
			}
		}
		return true
	})
}

func TestDoneEndsBoth(t *testing.T) {
	for _, before := range []string{"", "worker", "keeper"} {
		k := startKept(t)
		k.pids()
		switch before {
		case "worker":
			k.killWorker()
		case "keeper":
			k.killKeeper()
		}
		k.want("done", "ok")
		k.eventually("the end of both", func() bool {
			for _, pid := range k.processes() {
				if !gone(pid) {
					return false
				}
			}
			return true
		})
	}
}

func TestTermReachesTheWorker(t *testing.T) {
	k := startKept(t)
	_, keeper := k.pids()
	check.NoError(t, unix.Kill(keeper, unix.SIGTERM))
	if got := k.hear(); got != "term" {
		t.Fatal(got)
	}
	if now, _ := k.pids(); now == 0 {
		t.Fatal("the worker ended")
	}
}

func TestUpgradeExecutesInPlace(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	self, _ := os.Executable()
	copied := filepath.Join(t.TempDir(), "newer")
	program := check.Value(os.ReadFile(self))(t)
	check.NoError(t, os.WriteFile(copied, program, 0o755))
	check.NoError(t, os.Symlink(copied, k.program+".new"))
	check.NoError(t, os.Rename(k.program+".new", k.program))
	for range 3 {
		worker, keeper := k.pids()
		check.NoError(t, unix.Kill(keeper, syscall.SIGHUP))
		k.eventually("another worker", func() bool { return gone(worker) })
		now, same := k.pids()
		if same != keeper {
			t.Fatalf("the keeper is %d, was %d", same, keeper)
		}
		for _, pid := range []int{now, keeper} {
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe != copied {
				t.Errorf("process %d runs %s", pid, exe)
			}
		}
		k.want("get a", "/memfd:a (deleted)")
	}
	// What was asked for is no reason for a warning; what wasn't is.
	if text, _ := os.ReadFile(k.log); len(text) > 0 {
		t.Errorf("logged: %s", text)
	}
	k.killKeeper()
	k.killWorker()
	k.want("get a", "/memfd:a (deleted)")
	if text, _ := os.ReadFile(k.log); strings.Count(string(text), "the worker died") != 1 {
		t.Errorf("logged of a worker's death: %s", text)
	}
}

func TestABrokenUpgradeIsRefused(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	check.NoError(t, os.Rename(k.program, k.program+".good"))
	check.NoError(t, os.WriteFile(k.program, []byte("#!/bin/sh\nexit 3\n"), 0o755))
	worker, keeper := k.pids()
	check.NoError(t, unix.Kill(keeper, syscall.SIGHUP))
	k.eventually("the refusal", func() bool {
		text, _ := os.ReadFile(k.log)
		return strings.Contains(string(text), "not upgrading")
	})
	if w, kp := k.pids(); w != worker || kp != keeper {
		t.Fatalf("worker %d and keeper %d became %d and %d", worker, keeper, w, kp)
	}
	check.NoError(t, os.Rename(k.program+".good", k.program))
	k.killWorker()
	k.want("get a", "/memfd:a (deleted)")
}

// A program's file that can't do it any more ends no pair: each goes on with the program that it runs itself.
func TestABrokenProgramEndsNothing(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	check.NoError(t, os.Remove(k.program))
	check.NoError(t, os.WriteFile(k.program, []byte("#!/bin/sh\nexit 3\n"), 0o755))
	for range 3 {
		k.killWorker()
		k.want("get a", "/memfd:a (deleted)")
		k.killKeeper()
		k.eventually("a keeper that runs", func() bool {
			_, keeper := k.pids()
			exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", keeper))
			return exe != "" && filepath.Base(exe) != "dash" && filepath.Base(exe) != "sh"
		})
	}
	k.killWorker()
	k.want("get a", "/memfd:a (deleted)")
}

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
	self := check.Value(os.Executable())(t)
	s := &systemd{t: t, program: self, path: "notify", held: make(map[string]*os.File)}
	s.socket = check.Value(unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(t)
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
	ends := check.Value(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0))(s.t)
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
	check.NoError(s.t, s.process.Start())
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
		messages := check.Value(unix.ParseSocketControlMessage(oob[:oobn]))(s.t)
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
	held := func() {
		t.Helper()
		for order, want := range map[string]string{"get a": "/memfd:a' (deleted)", "get b": "none", "pids": fmt.Sprint(s.process.Process.Pid, " 0")} {
			if got := s.ask(order); got != want {
				t.Errorf("%s: %s, not %s", order, got, want)
			}
		}
	}
	held()
	for range 2 {
		_ = s.process.Process.Kill()
		_ = s.process.Wait()
		s.start()
		held()
		// In place, and once more: the numbers are others each time.
		for range 3 {
			check.Value(unix.Write(s.orders, []byte("upgrade")))(t)
			held()
		}
	}
	s.ask("done")
	s.told("STOPPING=1")
}
