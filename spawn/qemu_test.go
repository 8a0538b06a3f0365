package spawn

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
