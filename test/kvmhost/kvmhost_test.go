package kvmhost

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/kvmhost/protocol"

	"golang.org/x/sys/unix"
)

func TestNative(t *testing.T) {
	_, missing := os.Stat("/dev/kvm")
	for _, c := range []struct {
		value  string
		native bool
		err    string
	}{
		{"emulated", false, ""},
		{"both", false, Variable + "=both; fix:"},
		{"native", missing == nil, map[bool]string{true: "", false: "fix: modprobe"}[missing == nil]},
	} {
		t.Setenv(Variable, c.value)
		native, err := Native()
		if native != c.native || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s=%s: %v, %v", Variable, c.value, native, err)
		}
	}
}

// On a machine with KVM a command runs where it is, with the same answers.
func TestNativeRun(t *testing.T) {
	for command, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 128 + 9} {
		if code, err := (Options{}).native([]string{"sh", "-c", command}); code != want || err != nil {
			t.Errorf("%s: %d, %v", command, code, err)
		}
	}
	if _, err := (Options{Timeout: 100 * time.Millisecond}).native([]string{"sleep", "600"}); err == nil || !strings.Contains(err.Error(), "didn't end within") {
		t.Error(err)
	}
}

func TestDepends(t *testing.T) {
	if _, err := depends([]byte("no module")); err == nil {
		t.Error("what isn't a module has dependencies")
	}
}

// host is the command run, and runs something on an emulated host.
func host(t *testing.T, flags ...string) *exec.Cmd {
	t.Helper()
	root := check.Value(built.Root())(t)
	program := filepath.Join(root, "build/host/run")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v; fix: make host", err)
	}
	cmd := exec.Command(program, flags...)
	cmd.Env = append(os.Environ(), Variable+"=emulated", "FTCLOCK_KVMHOST_TEST=a b")
	return cmd
}

// A command on an emulated host has real KVM, its own streams, directory and environment; its exit code comes back, and what
// it writes stays in the host, but for the directories that are shared.
func TestEmulatedHost(t *testing.T) {
	shared, outside := t.TempDir(), filepath.Join(t.TempDir(), "written")
	cmd := host(t, "--write", shared, "--", "bash", "-c", `
		read -r line; echo "read: $line"
		echo "variable: $FTCLOCK_KVMHOST_TEST, emulated: $`+EmulatedVariable+`"
		echo "directory: $PWD"
		grep -o kvm_amd /proc/modules | head -n 1
		[ -c /dev/kvm ] && echo "kvm"
		echo inside >"$0/file" && echo inside >"$1" && cat "$1"
		seq 200000 | cksum
		echo complaint >&2
		exit 7`, shared, outside)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("a line\n"), &stdout, &stderr
	if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 7 {
		t.Fatalf("%v\n%s%s", err, &stdout, &stderr)
	}
	dir := check.Value(os.Getwd())(t)
	sum := check.Value(exec.Command("sh", "-c", "seq 200000 | cksum").Output())(t)
	want := fmt.Sprintf("read: a line\nvariable: a b, emulated: 1\ndirectory: %s\nkvm_amd\nkvm\ninside\n%s", dir, sum)
	if got := stdout.String(); got != want {
		t.Errorf("it says\n%q, want\n%q", got, want)
	}
	if said := stderr.String(); !strings.Contains(said, "EMULATED") || !strings.HasSuffix(said, "complaint\n") {
		t.Errorf("its other stream says %q", said)
	}
	if text, err := os.ReadFile(shared + "/file"); err != nil || string(text) != "inside\n" {
		t.Errorf("the shared directory: %v, %q", err, text)
	}
	if _, err := os.Stat(outside); err == nil {
		t.Error("what was written elsewhere is on the machine")
	}
}

// The second interrupt, and the end of the time, take the host away.
func TestTheHostGoes(t *testing.T) {
	scratch := filepath.Join(os.TempDir(), "ftclock-host-*")
	others, _ := filepath.Glob(scratch) // of hosts that were killed, or run
	cmd := host(t, "--timeout", "20s", "--", "sh", "-c", "sleep 1000")
	if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState.ExitCode() != 125 || !strings.Contains(string(out), "didn't end within 20s") {
		t.Errorf("%v: %s", err, out)
	}
	left, _ := filepath.Glob(scratch)
	for _, dir := range left {
		if qemu, _ := exec.Command("pgrep", "-f", dir).Output(); len(qemu) == 0 && !slices.Contains(others, dir) {
			t.Errorf("%s is left, and no QEMU uses it", dir)
		}
	}
}

// What a machine lacks is said in one line, with the fix.
func TestWhatAMachineLacks(t *testing.T) {
	dir, bin := t.TempDir(), t.TempDir()
	t.Setenv("PATH", bin)
	said := func(what string) {
		t.Helper()
		_, err := lacks(dir)
		if err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), "; fix: ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, not a line with %q", err, what)
		}
	}
	qemu := func(version string) {
		t.Helper()
		text := "#!/bin/sh\necho 'QEMU emulator version " + version + " (Debian 1:whatever)'\n"
		check.NoError(t, os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(text), 0o755))
	}
	said("needs qemu-system-x86_64")
	qemu("6.2.0")
	said("QEMU 6.2 is too old")
	qemu("10.0.2")
	if os.Geteuid() == 0 {
		if err := unix.Mount("small", dir, "tmpfs", 0, "size=1m"); err == nil {
			said("has room for 1 MiB")
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}
	}
	const all = math.MaxInt
	for _, c := range []struct{ available, limit, want int }{
		{1 << 20, all, 0}, {4 << 20, all, 3 << 10}, {8 << 20, all, 6 << 10}, {64 << 20, all, mostMemory}, {64 << 20, 2 << 20, 0}, {64 << 20, 8 << 20, 6 << 10},
	} {
		got, err := memoryFor(fmt.Appendf(nil, "MemTotal: 1 kB\nMemAvailable:   %d kB\n", c.available), c.limit)
		if got != c.want && c.want != 0 || (c.want == 0) != (err != nil) {
			t.Errorf("of %d kB available and %d allowed: %d MiB, %v", c.available, c.limit, got, err)
		}
		if c.want == 0 && !strings.Contains(err.Error(), fmt.Sprintf("%d MiB of memory are available, an emulated host needs 4096; fix: ", min(c.available, c.limit)>>10)) {
			t.Error(err)
		}
	}
}

// Debian's kernel is in one package, and from Linux 7.2 on in two. The apt-cache here is a fake.
func TestKernelPackages(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	for answers, want := range map[string][]string{
		"linux-image-amd64) echo '  Depends: linux-image-6.12.1-amd64' ;; *) echo '  PreDepends: linux-base'; echo '  Depends: kmod' ;;": {"linux-image-6.12.1-amd64"},
		`linux-image-amd64) echo '  Depends: linux-base-amd64'; echo '  Depends: linux-image-7.2.1-amd64' ;;
		 *) echo ' |Depends: dracut'; for part in base binary modules; do echo "  Depends: linux-$part-7.2.1-amd64"; done ;;`: {
			"linux-image-7.2.1-amd64", "linux-binary-7.2.1-amd64", "linux-modules-7.2.1-amd64"},
		"*) exit 1 ;;": nil,
	} {
		check.NoError(t, os.WriteFile(filepath.Join(bin, "apt-cache"), []byte("#!/bin/sh\ncase $2 in "+answers+"\nesac\n"), 0o755))
		got, err := (&apt{dir: bin}).kernel()
		if !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
}

// Of what a kernel prints of its own crash the beginning is shown, and the end.
func TestWordsOfACrash(t *testing.T) {
	before, crash := slices.Repeat([]string{"[ 1.0] before"}, 500), []string{"[ 2.0] BUG: TASK stack guard page was hit"}
	for i := range 999 {
		crash = append(crash, fmt.Sprintf("[ 2.1] trace %d", i))
	}
	m := &machine{scratch: t.TempDir()}
	for _, c := range []struct{ console, want []string }{
		{before, before[460:]},
		{slices.Concat(before, crash[:100]), crash[:100]},
		{slices.Concat(before, crash), slices.Concat(crash[:30], crash[880:])},
	} {
		check.NoError(t, os.WriteFile(filepath.Join(m.scratch, "console"), []byte(strings.Join(c.console, "\n")), 0o600))
		if got, want := m.words(), strings.Join(c.want, "\n"); got != want {
			t.Errorf("%d lines: %q", len(c.console), got)
		}
	}
}

// A host is asked for beats from when it is up: the process that reads its job would take what comes behind that along.
func TestNothingComesBehindTheJob(t *testing.T) {
	pair := check.Value(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))(t)
	control, inside := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "inside")
	defer control.Close()
	h, up := &Host{machine: &machine{control: control}, gone: make(chan struct{})}, make(chan error, 1)
	go h.follow(up)
	check.NoError(t, inside.SetReadDeadline(time.Now().Add(3*protocol.BeatSeconds*time.Second)))
	if n, err := inside.Read(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes before it is up", n)
	}
	check.NoError(t, inside.SetReadDeadline(time.Now().Add(2*time.Minute)))
	check.NoError(t, json.NewEncoder(inside).Encode(protocol.Progress{Up: &protocol.Up{}}))
	check.NoError(t, <-up)
	var c protocol.Call
	if err := json.NewDecoder(inside).Decode(&c); err != nil || c.Args != nil {
		t.Errorf("%+v, %v", c, err)
	}
	inside.Close()
	<-h.gone
}
