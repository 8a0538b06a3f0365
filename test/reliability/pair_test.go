package reliability

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/spawn"
	"ftclock/test/check"
	"ftclock/test/endings"
)

// patience bounds every wait for something that has to come. It is no measure of anything.
const patience = 2 * time.Minute

var shimPath string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ftclock-reliability")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	shimPath = filepath.Join(dir, "ftclock-shim")
	build := exec.Command("go", "build", "-o", shimPath, "ftclock/cmd/ftclock-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building ftclock-shim: %v\n%s", err, out)
		return 1
	}
	// What a killed process of the pair leaves behind comes to us, so that none can hide.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// A pair is a shim that runs, between a client and a QEMU that are this test.
type pair struct {
	t            *testing.T
	uuid         string
	state, dir   string
	log          string
	first        *os.Process // the first keeper
	process      *exec.Cmd   // stands for QEMU's process: it holds the listening socket, and the shim ends with it
	client, qemu *net.UnixConn
	listener     *net.UnixListener
}

// startPair starts the shim as spawn does and connects both sides.
func startPair(t *testing.T) *pair {
	t.Helper()
	root, err := os.MkdirTemp("", "ft") // a socket's address is short; the directory of a test may not be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	random := make([]byte, 6)
	_, _ = rand.Read(random)
	p := &pair{t: t, uuid: "6695eb01-f6a4-8304-79aa-" + hex.EncodeToString(random), state: filepath.Join(root, "s"), dir: filepath.Join(root, "d"),
		log: filepath.Join(root, "log")}
	check.NoError(t, os.Mkdir(p.dir, 0o700))

	// As libvirt: bound under one name, handed to QEMU, renamed by the hook.
	bound := filepath.Join(p.dir, control.MonitorSocket)
	p.listener = check.Value(net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"}))(t)
	p.listener.SetUnlinkOnClose(false)
	t.Cleanup(func() { p.listener.Close() })
	f := check.Value(p.listener.File())(t)
	defer f.Close()
	p.process = exec.Command("sleep", "infinity")
	p.process.ExtraFiles = []*os.File{f}
	check.NoError(t, p.process.Start())
	t.Cleanup(p.endProcess)
	pidFile := filepath.Join(root, "pid")
	check.NoError(t, os.WriteFile(pidFile, []byte(strconv.Itoa(p.process.Process.Pid)), 0o600))
	check.NoError(t, os.Rename(bound, filepath.Join(p.dir, control.QEMUSocket)))

	log := check.Value(os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600))(t)
	defer log.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	t.Cleanup(p.killAll)
	if p.first, err = spawn.StartProgram(ctx, shimPath, log, p.state, spawn.Spec{
		UUID: p.uuid, Name: "peers", Module: "/nonexistent/libftclock-qemu.so", DomainDir: p.dir, PIDFile: pidFile,
		Stops: filepath.Join(root, "stops"),
	}); err != nil {
		t.Fatalf("%v\n%s", err, p.logText())
	}
	p.client = check.Value(net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(p.dir, control.MonitorSocket), Net: "unix"}))(t)
	t.Cleanup(func() { p.client.Close() })
	p.qemu = check.Value(p.listener.AcceptUnix())(t)
	t.Cleanup(func() { p.qemu.Close() })
	return p
}

// settled waits until the relay runs and the shim has tried, in vain, to load the module.
func (p *pair) settled() {
	p.t.Helper()
	check.Value(p.qemu.Write([]byte(`{"QMP": {"version": {}, "capabilities": []}}` + "\r\n")))(p.t)
	check.Value(bytesUntil(p.client, '\n'))(p.t)
	p.status(func(s *control.Status) bool { return s.State == control.Uncorrected && s.QEMU != 0 })
}

func bytesUntil(c net.Conn, end byte) ([]byte, error) {
	var all []byte
	b := make([]byte, 1)
	for {
		if _, err := c.Read(b); err != nil {
			return all, err
		}
		if all = append(all, b[0]); b[0] == end {
			return all, nil
		}
	}
}

func (p *pair) endProcess() {
	_ = p.process.Process.Kill()
	_ = p.process.Wait()
}

// killAll is for a test that failed.
func (p *pair) killAll() {
	if left := endings.Kill(p.processes, patience); len(left) > 0 {
		p.t.Errorf("they don't end: %v", left)
	}
	if p.first != nil {
		_, _ = p.first.Wait()
	}
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != nil && !errors.Is(err, unix.EINTR) || pid == 0 {
			return
		}
	}
}

// processes finds everything that was started for this pair, by its UUID among the arguments. Zombies have none.
func (p *pair) processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		args, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if bytes.Contains(args, []byte(p.uuid)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// eventually waits until what holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	check.Await(t, patience, 2*time.Millisecond, holds, "%s", what)
}

// status asks until an answer suits.
func (p *pair) status(suits func(*control.Status) bool) *control.Status {
	p.t.Helper()
	var last string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		answer, err := control.Ask(p.state, p.uuid, control.Request{Do: "status"})
		if err == nil && suits(answer.Status) {
			return answer.Status
		}
		last = fmt.Sprintf("%+v, %v", answer.Status, err)
	}
	p.t.Fatalf("the pair isn't whole: %s\n%s", last, p.logText())
	return nil
}

func (p *pair) whole() *control.Status {
	p.t.Helper()
	return p.status(func(s *control.Status) bool { return s.Shim > 0 && s.Keeper > 0 })
}

func (p *pair) logText() string {
	text, _ := os.ReadFile(p.log)
	return string(text[max(0, len(text)-4000):])
}

// relays waits until the shim relays: what it has open for the connection it has open then.
func (p *pair) relays() {
	p.t.Helper()
	check.Value(p.qemu.Write([]byte(`{"event": "NOTHING"}` + "\r\n")))(p.t)
	check.Value(bytesUntil(p.client, '\n'))(p.t)
}

// openFDs counts what a process has open.
func openFDs(pid int) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries)
}

// zombies finds the dead children of parents that nobody has buried.
func zombies(parents ...int) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		// pid (name) state ppid (proc_pid_stat(5)); the name may hold anything.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) < 2 || fields[0] != "Z" {
			continue
		}
		for _, parent := range parents {
			if fields[1] == strconv.Itoa(parent) {
				pid, _ := strconv.Atoi(e.Name())
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// killWorker kills the worker and waits for the next one.
func (p *pair) killWorker(s *control.Status) *control.Status {
	p.t.Helper()
	check.NoError(p.t, unix.Kill(s.Shim, unix.SIGKILL))
	next := p.status(func(n *control.Status) bool { return n.Shim != s.Shim })
	if next.Keeper != s.Keeper || next.Workers != s.Workers+1 {
		p.t.Fatalf("worker %d of keeper %d follows worker %d of keeper %d\n%s", next.Workers, next.Keeper, s.Workers, s.Keeper, p.logText())
	}
	return next
}

// killKeeper kills the keeper and waits for the next one.
func (p *pair) killKeeper(s *control.Status) *control.Status {
	p.t.Helper()
	check.NoError(p.t, unix.Kill(s.Keeper, unix.SIGKILL))
	next := p.status(func(n *control.Status) bool { return n.Keeper != s.Keeper })
	if next.Shim != s.Shim || next.Workers != s.Workers {
		p.t.Fatalf("after the keeper's death the worker is %d, it was %d\n%s", next.Shim, s.Shim, p.logText())
	}
	return next
}

// upgrade has the keeper execute the program anew and waits for the worker that follows. A keeper that was just started may die of
// the signal, and the next one is told.
func (p *pair) upgrade(s *control.Status) *control.Status {
	p.t.Helper()
	told := 0
	next := p.status(func(n *control.Status) bool {
		if n.Shim == s.Shim && n.Keeper != told {
			told = n.Keeper
			_ = unix.Kill(told, unix.SIGHUP)
		}
		return n.Shim != s.Shim
	})
	if next.Workers != s.Workers+1 {
		p.t.Fatalf("after an upgrade: worker %d of keeper %d, before: worker %d of keeper %d\n%s", next.Workers, next.Keeper, s.Workers, s.Keeper, p.logText())
	}
	return next
}

// gone waits until nothing is left of the pair.
func (p *pair) gone() {
	p.t.Helper()
	eventually(p.t, "the end of every process of the pair", func() bool { return len(p.processes()) == 0 })
	// QEMU's goes, too: after a host's next boot it would be in the way of a domain of the same id and name.
	for _, name := range []string{control.MonitorSocket, control.QEMUSocket} {
		if _, err := os.Lstat(filepath.Join(p.dir, name)); err == nil {
			p.t.Errorf("the shim left %s behind", name)
		}
	}
	if _, err := os.Stat(filepath.Join(p.state, p.uuid)); err == nil {
		p.t.Error("the shim left its state behind")
	}
}

// settledQueue says that something waits to be read and doesn't become more.
func settledQueue(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	look := func() (n int) {
		_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		return n
	}
	first := look()
	time.Sleep(20 * time.Millisecond)
	return first > 0 && look() == first
}
