package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ftclock/attach"
	"ftclock/test/check"
	"ftclock/test/fds"
	metadata "ftclock/xml-templates"
)

func TestMain(m *testing.M) { os.Exit(fds.Run(m)) }

// fakeEvents are the kernel's words, by hand.
type fakeEvents struct {
	pids  chan int
	ended chan struct{}
	once  sync.Once
}

func (e *fakeEvents) Next() (int, error) {
	select {
	case pid := <-e.pids:
		if pid < 0 {
			return 0, errors.New("no more words")
		}
		return pid, nil
	case <-e.ended:
		return 0, os.ErrClosed
	}
}

func (e *fakeEvents) Close() error {
	e.once.Do(func() { close(e.ended) })
	return nil
}

// A host has processes that are real, and what /proc says of their programs, which is made up.
type fakeHost struct {
	t      *testing.T
	node   *Node
	events *fakeEvents
	result chan error

	mu     sync.Mutex
	ready  map[int]error  // nil where it isn't there
	left   map[int]string // why it is left alone
	fails  map[int]error  // what serving it comes to
	served []QEMU
	log    []string
}

func newHost(t *testing.T) *fakeHost {
	h := &fakeHost{t: t, events: &fakeEvents{pids: make(chan int), ended: make(chan struct{})}, result: make(chan error, 1),
		ready: map[int]error{}, left: map[int]string{}, fails: map[int]error{}}
	say := func(format string, args ...any) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.log = append(h.log, fmt.Sprintf(format, args...))
	}
	h.node = &Node{
		Proc: t.TempDir(), Policies: t.TempDir(), Info: say, Warn: say,
		patience: patience{first: time.Millisecond, last: 2 * time.Millisecond, vm: time.Minute, idle: time.Minute, again: time.Millisecond, attempts: 3},
		Server: Server{
			Left: func(q QEMU) (string, bool, error) {
				h.mu.Lock()
				defer h.mu.Unlock()
				return h.left[q.PID], h.left[q.PID] == "ours", nil
			},
			Ready: func(pid int) error {
				h.mu.Lock()
				defer h.mu.Unlock()
				return h.ready[pid]
			},
			Serve: func(_ context.Context, q QEMU, p metadata.Policy, file string) error {
				h.mu.Lock()
				defer h.mu.Unlock()
				if err := h.fails[q.PID]; err != nil {
					return err
				}
				if filepath.Dir(file) != h.node.Policies || !p.Required {
					t.Errorf("%s by %s: %+v", q, file, p)
				}
				h.served = append(h.served, q)
				return nil
			},
		},
	}
	h.policy("web-*", "")
	return h
}

func (h *fakeHost) policy(name, attributes string) {
	h.t.Helper()
	const content = `<policy xmlns="urn:ftclock:policy:1"><for name="%s"/><clock xmlns="urn:ftclock:domain:1"%s/></policy>`
	check.NoError(h.t, os.WriteFile(filepath.Join(h.node.Policies, "a.xml"), fmt.Appendf(nil, content, name, attributes), 0o644))
}

// run runs the node until the test's end.
func (h *fakeHost) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.result <- h.node.Run(ctx, h.events)
	}()
	h.t.Cleanup(func() {
		cancel()
		<-done
	})
}

// qemu starts a process and says of it that its program is at exe, and which guest it has.
func (h *fakeHost) qemu(exe, name string) *exec.Cmd {
	h.t.Helper()
	cmd := exec.Command("sleep", "1000")
	check.NoError(h.t, cmd.Start())
	h.t.Cleanup(func() { end(cmd) })
	h.is(cmd, exe, name)
	return cmd
}

// is says it anew, as after an execve.
func (h *fakeHost) is(cmd *exec.Cmd, exe, name string) {
	h.t.Helper()
	dir := filepath.Join(h.node.Proc, strconv.Itoa(cmd.Process.Pid))
	check.NoError(h.t, os.MkdirAll(dir, 0o755))
	_ = os.Remove(filepath.Join(dir, "exe"))
	check.NoError(h.t, os.Symlink(exe, filepath.Join(dir, "exe")))
	check.NoError(h.t, os.WriteFile(filepath.Join(dir, "cmdline"), []byte(exe+"\x00-name\x00guest="+name+",debug-threads=on\x00"), 0o644))
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func (h *fakeHost) says(what string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(h.log, func(line string) bool { return strings.Contains(line, what) })
}

func (h *fakeHost) await(what string) {
	h.t.Helper()
	check.Await(h.t, time.Minute, time.Millisecond, func() bool { return h.says(what) }, "the log never says %s", what)
}

func (h *fakeHost) names() (names []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, q := range h.served {
		names = append(names, q.Name)
	}
	slices.Sort(names)
	return names
}

func (h *fakeHost) set(pid int, ready error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ready[pid] = ready
}

const program = "/usr/bin/qemu-system-x86_64"

func TestNamedOnesAreServed(t *testing.T) {
	h := newHost(t)
	before := h.qemu(program, "web-1")
	h.qemu(program, "db-1")
	h.qemu("/usr/bin/sleep", "web-no")
	h.run()
	h.await("web-1 (QEMU")
	// Later ones come by the kernel's word, and wait for their virtual machine and their main thread.
	later, other := h.qemu("/usr/libexec/qemu-kvm (deleted)", "web-2"), h.qemu(program, "db-2")
	h.set(later.Process.Pid, fmt.Errorf("x: %w", attach.ErrNoVM))
	for _, pid := range []int{later.Process.Pid, other.Process.Pid, before.Process.Pid, os.Getpid(), 1 << 22, later.Process.Pid} {
		h.events.pids <- pid
	}
	h.set(later.Process.Pid, fmt.Errorf("x: %w", attach.ErrBusy))
	if h.says("web-2") {
		t.Error("it isn't ready")
	}
	h.set(later.Process.Pid, nil)
	h.await("web-2 (QEMU")
	// A word may be lost.
	h.qemu(program, "web-3")
	h.events.pids <- 0
	h.await("web-3 (QEMU")
	if got := h.names(); !slices.Equal(got, []string{"web-1", "web-2", "web-3"}) {
		t.Errorf("served: %q", got)
	}
	// What has ended is forgotten, and the next one of the pid is another one.
	open := len(fds.Open())
	end(later)
	check.Await(t, time.Minute, time.Millisecond, func() bool { return len(fds.Open()) < open }, "the descriptor of a process that has ended stays open")
	check.Await(t, time.Minute, time.Millisecond, func() bool {
		h.node.mu.Lock()
		defer h.node.mu.Unlock()
		return len(h.node.known) == 2
	}, "it isn't forgotten")
	h.events.pids <- -1
	if err := <-h.result; err == nil || !strings.Contains(err.Error(), "no more words") {
		t.Errorf("it ended with %v", err)
	}
}

func TestWhatIsLeftAlone(t *testing.T) {
	h := newHost(t)
	h.policy("*", "")
	h.node.patience.vm, h.node.patience.idle = 0, 0
	h.run()
	for name, c := range map[string]struct {
		ready error
		fails error
		left  string
		want  string
	}{
		"tcg":    {ready: attach.ErrNoVM, want: "is left alone: it was waited for: not a QEMU with a KVM"},
		"busy":   {ready: attach.ErrBusy, want: "is left alone: it was waited for: main thread is never idle"},
		"musl":   {fails: fmt.Errorf("%w: built for musl", attach.ErrNoSlot), want: "is left alone: nowhere for the module to hook in: built for musl"},
		"flaky":  {fails: errors.New("the disk is full"), want: "is left alone: the disk is full (tried 3 times)"},
		"hooked": {left: "libvirt's hook serves it", want: "is left alone: libvirt's hook serves it"},
		"ours":   {left: "ours", want: "is served already"},
		"evil\n\x1b[2J" + strings.Repeat("x", 1000): {left: "no", want: "evil [2J" + strings.Repeat("x", 256-8) + " (QEMU"},
	} {
		q := h.qemu(program, name)
		pid := q.Process.Pid
		h.mu.Lock()
		h.ready[pid], h.fails[pid], h.left[pid] = c.ready, c.fails, c.left
		h.mu.Unlock()
		h.events.pids <- pid
		h.await(c.want)
		h.events.pids <- pid // once is enough
		h.events.pids <- 0
		h.mu.Lock()
		if n := strings.Count(strings.Join(h.log, "\n"), c.want); n != 1 {
			t.Errorf("%q is said %d times", c.want, n)
		}
		h.mu.Unlock()
	}
	if got := h.names(); len(got) > 0 {
		t.Errorf("served: %q", got)
	}
}

func TestWrongPolicies(t *testing.T) {
	h := newHost(t)
	h.policy("web-*", ` mode="x"`)
	h.qemu(program, "web-1")
	h.run()
	h.await("is left alone: the host's policy for it is wrong: ")
	for range 3 {
		h.events.pids <- 0
	}
	h.mu.Lock()
	all := strings.Join(h.log, "\n")
	h.mu.Unlock()
	if n := strings.Count(all, "unknown attribute"); n != 2 { // of the file, and of the QEMU
		t.Errorf("said %d times:\n%s", n, all)
	}
	check.NoError(t, os.Chmod(h.node.Policies, 0o777))
	h.qemu(program, "web-2")
	h.events.pids <- 0
	h.events.pids <- 0
	h.await("can be written by others")
	check.NoError(t, os.Chmod(h.node.Policies, 0o755))
	h.policy("web-*", "")
	h.events.pids <- 0
	h.await("web-2 (QEMU")
}

// A QEMU that daemonizes forks, and executes nothing.
func TestChildOfOneThatEnds(t *testing.T) {
	h := newHost(t)
	parent := h.qemu(program, "web-1")
	h.set(parent.Process.Pid, attach.ErrNoVM)
	h.run()
	child := h.qemu(program, "web-1")
	end(parent)
	check.NoError(t, os.RemoveAll(filepath.Join(h.node.Proc, strconv.Itoa(parent.Process.Pid))))
	h.await(fmt.Sprintf("web-1 (QEMU %d) is served from now on", child.Process.Pid))
}

// What executes itself anew before it is served may be another guest's, or one that nobody names.
func TestExecutedAnew(t *testing.T) {
	h := newHost(t)
	q := h.qemu(program, "web-1")
	h.set(q.Process.Pid, attach.ErrNoVM)
	h.run()
	check.Await(t, time.Minute, time.Millisecond, func() bool {
		h.node.mu.Lock()
		defer h.node.mu.Unlock()
		return len(h.node.known) == 1
	}, "it isn't seen")
	h.is(q, program, "db-1")
	h.set(q.Process.Pid, nil)
	h.await("db-1 (QEMU " + strconv.Itoa(q.Process.Pid) + ") isn't named any more")
	if got := h.names(); len(got) > 0 {
		t.Errorf("served: %q", got)
	}
}

func TestEvery(t *testing.T) {
	e := Every(time.Millisecond)
	for range 3 {
		if pid, err := e.Next(); pid != 0 || err != nil {
			t.Error(pid, err)
		}
	}
	check.NoError(t, e.Close())
	e = Every(time.Hour)
	go e.Close()
	if _, err := e.Next(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

func TestAwait(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	check.NoError(t, cmd.Start())
	defer end(cmd)
	p := check.Value(openProcess(cmd.Process.Pid))(t)
	defer p.close()
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	if p.await(ctx, 20*time.Millisecond) || time.Since(began) < 20*time.Millisecond {
		t.Error("it didn't wait, or has ended")
	}
	go func() {
		time.Sleep(10 * time.Millisecond)
		cancel()
	}()
	if p.await(ctx, 0) {
		t.Error("it hasn't ended")
	}
	go cmd.Process.Kill()
	if !p.await(t.Context(), 0) || !p.await(t.Context(), time.Nanosecond) {
		t.Error("it has ended")
	}
	_ = cmd.Wait()
	if _, err := openProcess(cmd.Process.Pid); err == nil {
		t.Error("there is no such process")
	}
}
