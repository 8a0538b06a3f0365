package attach

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

func TestIsQEMUOf(t *testing.T) {
	line := func(args ...string) []byte { return []byte(strings.Join(args, "\x00") + "\x00") }
	for _, test := range []struct {
		what    string
		cmdline []byte
		want    bool
	}{
		{"libvirt's", line("/usr/bin/qemu-system-x86_64", "-name", "guest=a,b,debug-threads=on", "-S", "-uuid", testID), true},
		{"another uuid", line("/usr/bin/qemu-system-x86_64", "-name", "guest=web", "-uuid", strings.Replace(testID, "6", "7", 1)), false},
		{"name alone", line("qemu", "-name", "guest=web,debug-threads=on"), true},
		{"name at the end", line("qemu", "-name", "guest=web"), true},
		{"longer name", line("qemu", "-name", "guest=web2"), false},
		{"longer name with a comma", line("qemu", "-name", "guest=web,,2"), false},
		{"nothing behind", line("qemu", "-uuid"), false},
		{"empty", nil, false},
	} {
		if got := isQEMUOf(test.cmdline, "web", testID); got != test.want {
			t.Errorf("%s: got %t", test.what, got)
		}
	}
	if !isQEMUOf(line("qemu", "-name", "guest=a,,b,debug-threads=on"), "a,b", testID) {
		t.Error("a name with a comma isn't found")
	}
}

func TestGuest(t *testing.T) {
	for cmdline, want := range map[string][2]string{
		"qemu\x00-name\x00guest=web,debug-threads=on\x00-S\x00":          {"web"},
		"qemu\x00-name\x00web\x00":                                       {"web"},
		"qemu\x00--name\x00debug-threads=on,guest=web\x00":               {"web"},
		"qemu\x00-name\x00debug-threads=on\x00":                          {},
		"qemu\x00-name\x00guest=a,,b,process=x\x00":                      {"a,b"},
		"qemu\x00-name\x00guest=,,,,\x00-uuid\x00no uuid\x00":            {",,", "no uuid"},
		"qemu\x00-uuid\x00" + strings.ToUpper(testID) + "\x00-S\x00":     {"", testID},
		"qemu\x00-uuid\x00" + testID + "\x00-name\x00guest=a/\n../b\x00": {"a/\n../b", testID},
		"qemu\x00-S\x00":    {},
		"qemu\x00-name":     {},
		"qemu\x00-name\x00": {},
		"":                  {},
	} {
		if name, uuid := parseGuest([]byte(cmdline)); name != want[0] || uuid != want[1] {
			t.Errorf("%q: %q, %q, want %q", cmdline, name, uuid, want)
		}
	}
}

// Who took QEMU over may make its command line as long as its memory: whoever reads it takes the beginning.
func TestFindQEMUReadsNoMoreThanTheBeginning(t *testing.T) {
	root := t.TempDir()
	proc := filepath.Join(root, "proc/4711")
	for _, dir := range []string{proc, filepath.Join(root, "run")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range map[string]string{
		filepath.Join(root, "run/web.pid"): "4711\n",
		filepath.Join(proc, "cmdline"):     "qemu\x00-name\x00guest=web\x00-uuid\x00" + testID + "\x00",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/usr/bin/qemu-system-x86_64", filepath.Join(proc, "exe")), os.Truncate(filepath.Join(proc, "cmdline"), 1<<43)); err != nil {
		t.Fatal(err)
	}
	if pid, err := FindQEMU(root, "run", "web", testID); err != nil || pid != 4711 {
		t.Errorf("%d, %v", pid, err)
	}
}

func FuzzGuest(f *testing.F) {
	f.Add([]byte("qemu\x00-name\x00guest=a,,b,debug-threads=on\x00-uuid\x00" + testID + "\x00"))
	f.Fuzz(func(t *testing.T, cmdline []byte) {
		name, uuid := parseGuest(cmdline)
		if len(name)+len(uuid) > len(cmdline)+len(testID) {
			t.Errorf("%q, %q", name, uuid)
		}
	})
}

// fakeProc makes a tree with libvirt's pid file and one process.
func fakeProc(t *testing.T, pidFile, exe, cmdline string) (root string) {
	t.Helper()
	root = t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("run/libvirt/qemu/web.pid", pidFile)
	write("proc/4711/cmdline", cmdline)
	if err := os.Symlink(exe, filepath.Join(root, "proc/4711/exe")); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestFindQEMU(t *testing.T) {
	const mine = "qemu\x00-uuid\x00" + testID + "\x00"
	for _, test := range []struct{ what, pidFile, exe, cmdline, wrong string }{
		{"Debian", "4711\n", "/usr/bin/qemu-system-x86_64", mine, ""},
		{"Red Hat", "4711", "/usr/libexec/qemu-kvm", mine, ""},
		{"upgraded meanwhile", "4711", "/usr/bin/qemu-system-x86_64 (deleted)", mine, ""},
		{"pid reused", "4711", "/usr/bin/sleep", mine, "is /usr/bin/sleep, not QEMU"},
		{"another domain's", "4711", "/usr/bin/qemu-system-x86_64", "qemu\x00-uuid\x00x\x00", "another domain"},
		{"gone", "4712", "/usr/bin/qemu-system-x86_64", mine, "no such file"},
		{"garbage", "-1", "/usr/bin/qemu-system-x86_64", mine, "holds no pid"},
		{"empty", "", "/usr/bin/qemu-system-x86_64", mine, "holds no pid"},
	} {
		pid, err := FindQEMU(fakeProc(t, test.pidFile, test.exe, test.cmdline), "/run/libvirt/qemu", "web", testID)
		switch {
		case test.wrong == "" && (err != nil || pid != 4711):
			t.Errorf("%s: got %d, %v", test.what, pid, err)
		case test.wrong != "" && (err == nil || !strings.Contains(err.Error(), test.wrong)):
			t.Errorf("%s: got %v, want %q", test.what, err, test.wrong)
		}
	}
}

// The QEMU is this process, which listens on a socket that somebody renamed after it was bound, as the hook does.
func TestFindListening(t *testing.T) {
	t.Chdir(t.TempDir())
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	bound, pidFile := filepath.Join(dir, "m"), filepath.Join(dir, "a.pid")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := os.Rename(bound, bound+".qemu"); err != nil {
		t.Fatal(err)
	}
	names := func(pid int) {
		t.Helper()
		if err := os.WriteFile(pidFile, []byte(strconv.Itoa(pid)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	find := func(path string) (int, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		pid, pidfd, err := FindListening(ctx, pidFile, path)
		if err != nil {
			if pid != 0 || pidfd != -1 {
				t.Errorf("%d, %d with %v", pid, pidfd, err)
			}
			return pid, err
		}
		return pid, errors.Join(unix.PidfdSendSignal(pidfd, 0, nil, 0), unix.Close(pidfd))
	}
	if _, err := find(bound); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a pid file: %v", err)
	}
	go func() { // libvirt's pid file comes late
		time.Sleep(20 * time.Millisecond)
		names(os.Getpid())
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	pid, pidfd, err := FindListening(ctx, pidFile, bound)
	if err != nil || pid != os.Getpid() {
		t.Fatalf("%d, %v", pid, err)
	}
	unix.Close(pidfd)
	if _, err := find(bound + ".qemu"); err == nil || !strings.Contains(err.Error(), "doesn't listen on") {
		t.Errorf("by a name that it wasn't bound to: %v", err)
	}
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	names(child.Process.Pid)
	if _, err := find(bound); err == nil || !strings.Contains(err.Error(), "doesn't listen on") {
		t.Errorf("by the pid of a process that doesn't listen: %v", err)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
	if _, err := find(bound); !errors.Is(err, unix.ESRCH) {
		t.Errorf("by the pid of a process that has ended: %v", err)
	}
	if !Listens(bound) || Listens(bound+".qemu") {
		t.Error("what listens isn't seen, or what doesn't is")
	}
	listener.Close()
	if Listens(bound) {
		t.Error("what listened still does")
	}
}
