package attach

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	testbuilt "ftclock/test/built"
	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

// The test binary runs itself again in these roles, named by the environment.
const roleVariable = "FTCLOCK_ATTACH_ROLE"

var roles = map[string]func(args []string) error{
	"loader": loader,
	"holder": holder,
	"mortal": mortal,
	"nobody": nobody,
}

func TestMain(m *testing.M) {
	if role, ok := roles[os.Getenv(roleVariable)]; ok {
		if err := role(os.Args[1:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(checked(m))
}

// checked runs the tests, and looks for what they have left open or uncollected.
func checked(m *testing.M) int {
	before := openFiles()
	code := m.Run()
	if after := openFiles(); len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "leaked file descriptors: %v, before: %v\n", after, before)
		code = 1
	}
	var status unix.WaitStatus
	if pid, err := unix.Wait4(-1, &status, unix.WNOHANG|unix.WALL, nil); !errors.Is(err, unix.ECHILD) {
		fmt.Fprintf(os.Stderr, "left a child: pid %d, status %#x, error %v\n", pid, status, err)
		code = 1
	}
	return code
}

// openFiles lists our descriptors. The runtime's own (its poller) are opened at the first use, here.
func openFiles() []string {
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	var open []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		if link, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil {
			open = append(open, entry.Name()+" "+link)
		}
	}
	return open
}

// built is the path of what the Makefile builds for these tests.
func built(t *testing.T, name string) string {
	t.Helper()
	path := check.Value(testbuilt.Path(name))(t)
	return path
}

func targetProgram(t *testing.T) string { return built(t, testbuilt.Target) }

func module(t *testing.T) string { return built(t, testbuilt.TargetModule) }

// copied gives a file another name and inode: dlopen takes it for another library.
func copied(t *testing.T, from, to string) string {
	t.Helper()
	content := check.Value(os.ReadFile(from))(t)
	check.NoError(t, os.WriteFile(to, content, 0o755))
	return to
}

// target is a running testdata/target.c.
type target struct {
	t     *testing.T
	cmd   *exec.Cmd
	pid   int
	stdin io.WriteCloser
	lines *bufio.Reader
	ended bool
}

func start(t *testing.T, program string, words ...string) *target {
	t.Helper()
	return startCommand(t, exec.Command(program, words...))
}

func startCommand(t *testing.T, cmd *exec.Cmd) *target {
	t.Helper()
	stdin := check.Value(cmd.StdinPipe())(t)
	stdout := check.Value(cmd.StdoutPipe())(t)
	cmd.Stderr = os.Stderr
	check.NoError(t, cmd.Start())
	g := &target{t: t, cmd: cmd, pid: cmd.Process.Pid, stdin: stdin, lines: bufio.NewReader(stdout)}
	t.Cleanup(g.kill)
	if line, err := g.lines.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the target says %q, %v", line, err)
	}
	return g
}

func (g *target) kill() {
	if !g.ended {
		g.ended = true
		_ = g.cmd.Process.Kill()
		g.stdin.Close()
		_ = g.cmd.Wait()
	}
}

// ask has the target answer from its loop, and returns how many rounds it has made and signals it has taken. A register
// that wasn't what it should be shows here.
func (g *target) ask() (rounds, signals int) {
	g.t.Helper()
	if _, err := g.stdin.Write([]byte("?")); err != nil {
		g.t.Errorf("asking the target: %v", err)
	}
	line, err := g.lines.ReadString('\n')
	if n, _ := fmt.Sscanf(line, "ok %d %d\n", &rounds, &signals); n != 2 {
		g.t.Fatalf("the target says %q, %v", line, err)
	}
	return rounds, signals
}

// The signal masks of testdata/target.c: its own, and that of ppoll with the word "mask".
var ownMasks = []string{"0000001000000800", "0000001000000a00", "0000000008000000"}

// fine checks that the target is as if nobody had been there. Its own look at its signal mask is part of its answer.
func (g *target) fine() {
	g.t.Helper()
	g.ask()
	g.ask()
	mask := check.Value(strconv.ParseUint(statusField(g.t, g.pid, "SigBlk"), 16, 64))(g.t)
	mask &^= 1 << (unix.SIGALRM - 1) // blocked while its handler runs, 2000 times a second
	if mask := fmt.Sprintf("%016x", mask); !slices.Contains(ownMasks, mask) {
		g.t.Fatalf("the target's signal mask is %s", mask)
	}
	if tracer := statusField(g.t, g.pid, "TracerPid"); tracer != "0" {
		g.t.Fatalf("the target is still traced by %s", tracer)
	}
}

// startIsClean checks that _start is as in the file.
func (g *target) startIsClean() bool {
	g.t.Helper()
	s := g.survey(module(g.t))
	defer s.close()
	return g.start(s) == s.code
}

func (g *target) start(s *subject) (code [stubRoom]byte) {
	g.t.Helper()
	check.Value(s.mem.ReadAt(code[:], int64(s.entry)))(g.t)
	return code
}

func (g *target) survey(library string) *subject {
	g.t.Helper()
	s := check.Value(survey(g.pid, library, anyProgram))(g.t)
	return s
}

func anyProgram(*subject) error { return nil }

func statusField(t *testing.T, pid int, name string) string {
	t.Helper()
	content := check.Value(os.ReadFile(procPath(pid, "status")))(t)
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, name)
	return ""
}

// inRole runs the test binary in another role.
func inRole(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	return cmd
}

// loader loads libraries into pid without end, to be killed at any moment. Arguments: pid, libraries.
func loader(args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	s, err := survey(pid, args[1], anyProgram)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for i := os.Getpid(); ; i++ {
		s.library = args[1+i%(len(args)-1)]
		if _, err := s.inject(context.Background()); err != nil && !errors.Is(err, ErrDlopen) {
			return err
		}
	}
}

// mortal loads a library into pid, and dies before its nth request to ptrace, if it makes so many. Arguments: pid,
// library, n, and a word that says how it is to be loaded.
func mortal(args []string) error {
	pid, err1 := strconv.Atoi(args[0])
	left, err2 := strconv.Atoi(args[2])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	way := survey
	if strings.Contains(args[3], "sealed") {
		way = surveySealed
	}
	s, err := way(pid, args[1], anyProgram)
	if err != nil {
		return err
	}
	beforeRequest = func() {
		if left--; left == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	if _, err = s.inject(context.Background()); errors.Is(err, ErrDlopen) {
		return nil
	}
	return err
}

// holder traces pid until its standard input ends.
func holder(args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := (&tracee{pid: pid}).seize(); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// nobody calls Check as a user who may not trace pid.
func nobody(args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	const uid = 65534
	if err := unix.Setresgid(uid, uid, uid); err != nil {
		return err
	}
	if err := unix.Setresuid(uid, uid, uid); err != nil {
		return err
	}
	err = Check(pid, args[1])
	if !errors.Is(err, ErrRefused) {
		return fmt.Errorf("got %w, want ErrRefused", err)
	}
	fmt.Println(err)
	return nil
}

func patience(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	const fix = "tracing needs CAP_SYS_PTRACE; run the tests as root"
	if os.Getenv("FTCLOCK_REQUIRE") == "1" {
		t.Fatal(fix)
	}
	t.Skip(fix)
}

// needKVM skips, or fails where the machine is meant to have it.
func needKVM(t *testing.T) {
	t.Helper()
	fix := ""
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		fix = fmt.Sprintf("%v; modprobe kvm_intel or kvm_amd, with virtualisation enabled in the firmware, as root", err)
	} else {
		f.Close()
		if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
			fix = fmt.Sprintf("%v; apt install qemu-system-x86", err)
		}
	}
	if fix == "" {
		return
	}
	_, missing := os.Stat("/dev/kvm")
	if os.Getenv("FTCLOCK_REQUIRE") == "1" || (os.Getenv("CI") == "true" && missing == nil) {
		t.Fatal(fix)
	}
	t.Skip(fix)
}
