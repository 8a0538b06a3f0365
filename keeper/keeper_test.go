package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/test/endings"
)

// patience bounds every wait for something that has to come.
const patience = 2 * time.Minute

// TestMain is also the program that the tests keep: a worker that does what it is told on the descriptor "orders".
func TestMain(m *testing.M) {
	part := ""
	if len(os.Args) > 1 {
		part = os.Args[1]
	}
	log := func(what string) { fmt.Fprintln(os.Stderr, what) }
	switch part {
	case Flag:
		if err := Keep(log); err != nil {
			log(err.Error())
			os.Exit(1)
		}
	case "-worker":
		work(log)
	case "-version":
		fmt.Println("a test")
	default:
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			log(err.Error())
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
}

// work answers orders, each a packet, until it is told "done".
func work(log func(string)) {
	s, err := Open(log)
	if err != nil {
		log(err.Error())
		os.Exit(1)
	}
	orders, _ := s.Get("orders")
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM)
	go func() {
		<-terms
		_, _ = unix.Write(orders, []byte("term"))
	}()
	buf := make([]byte, 256)
	for {
		n, err := unix.Read(orders, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			os.Exit(1)
		}
		order, name, _ := strings.Cut(string(buf[:n]), " ")
		answer := "ok"
		switch order {
		case "put": // two of one name are different files
			fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
			if err == nil {
				s.Put(strings.TrimRight(name, "'"), fd)
			}
		case "drop":
			s.Drop(name)
		case "get":
			answer = "none"
			if fd, ok := s.Get(name); ok {
				answer, _ = os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
			}
		case "pids":
			answer = fmt.Sprint(os.Getpid(), " ", s.KeeperPID())
		case "ready":
			s.Ready()
		case "upgrade":
			if err := s.Upgrade(); err != nil {
				answer = err.Error()
			}
		case "done":
			s.Done()
		}
		_, _ = unix.Write(orders, []byte(answer))
		if order == "done" {
			os.Exit(0)
		}
	}
}

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
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	k := &kept{t: t, program: filepath.Join(dir, "program"), log: filepath.Join(dir, "log")}
	if err := os.Symlink(self, k.program); err != nil {
		t.Fatal(err)
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	k.orders = ends[0]
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(k.orders, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "orders")
	log, err := os.Create(k.log)
	if err != nil {
		t.Fatal(err)
	}
	k.first = exec.Command(k.program, Flag, "-worker")
	k.first.Env = append(os.Environ(), Passed([]string{"orders"})...)
	k.first.ExtraFiles = []*os.File{theirs}
	k.first.Stdout, k.first.Stderr = log, log
	err = k.first.Start()
	theirs.Close()
	log.Close()
	if err != nil {
		t.Fatal(err)
	}
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
	if _, err := unix.Write(k.orders, []byte(order)); err != nil {
		k.t.Fatal(err)
	}
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
	if _, err := fmt.Sscan(k.ask("pids"), &worker, &keeper); err != nil {
		k.t.Fatal(err)
	}
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

func TestDescriptorsOutliveBoth(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	k.want("put b", "ok")
	k.want("put a'", "ok") // in the place of a
	k.want("drop b", "ok")
	k.want("put c", "ok")
	check := func() {
		t.Helper()
		k.want("get a", "/memfd:a' (deleted)")
		k.want("get b", "none")
		k.want("get c", "/memfd:c (deleted)")
	}
	check()
	k.killWorker()
	check()
	k.killKeeper()
	check()
	k.killWorker() // by a keeper that a worker started
	check()
	k.want("put late", "ok") // a worker that a later keeper started reaches it
	k.killWorker()
	k.want("get late", "/memfd:late (deleted)")
	check()
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
	if err := unix.Kill(keeper, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
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
	program, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(copied, program, 0o755)
	}
	if err == nil {
		err = os.Symlink(copied, k.program+".new")
	}
	if err == nil {
		err = os.Rename(k.program+".new", k.program)
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		worker, keeper := k.pids()
		if err := unix.Kill(keeper, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
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
	if err := os.Rename(k.program, k.program+".good"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.program, []byte("#!/bin/sh\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	worker, keeper := k.pids()
	if err := unix.Kill(keeper, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	k.eventually("the refusal", func() bool {
		text, _ := os.ReadFile(k.log)
		return strings.Contains(string(text), "not upgrading")
	})
	if w, kp := k.pids(); w != worker || kp != keeper {
		t.Fatalf("worker %d and keeper %d became %d and %d", worker, keeper, w, kp)
	}
	if err := os.Rename(k.program+".good", k.program); err != nil {
		t.Fatal(err)
	}
	k.killWorker()
	k.want("get a", "/memfd:a (deleted)")
}

// A program's file that can't do it any more ends no pair: each goes on with the program that it runs itself.
func TestABrokenProgramEndsNothing(t *testing.T) {
	k := startKept(t)
	k.want("put a", "ok")
	if err := os.Remove(k.program); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.program, []byte("#!/bin/sh\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
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
