package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/control"
	"ftclock/xml-templates"
)

const someUUID = "11111111-1111-4111-8111-111111111111"

func TestIsQEMUOf(t *testing.T) {
	line := func(args ...string) []byte { return []byte(strings.Join(args, "\x00") + "\x00") }
	for _, test := range []struct {
		what    string
		cmdline []byte
		want    bool
	}{
		{"libvirt's", line("/usr/bin/qemu-system-x86_64", "-name", "guest=a,b,debug-threads=on", "-S", "-uuid", someUUID), true},
		{"another uuid", line("/usr/bin/qemu-system-x86_64", "-name", "guest=web", "-uuid", strings.Replace(someUUID, "1", "2", 1)), false},
		{"name alone", line("qemu", "-name", "guest=web,debug-threads=on"), true},
		{"name at the end", line("qemu", "-name", "guest=web"), true},
		{"longer name", line("qemu", "-name", "guest=web2"), false},
		{"longer name with a comma", line("qemu", "-name", "guest=web,,2"), false},
		{"nothing behind", line("qemu", "-uuid"), false},
		{"empty", nil, false},
	} {
		if got := isQEMUOf(test.cmdline, "web", someUUID); got != test.want {
			t.Errorf("%s: got %t", test.what, got)
		}
	}
	if !isQEMUOf(line("qemu", "-name", "guest=a,,b,debug-threads=on"), "a,b", someUUID) {
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
	const mine = "qemu\x00-uuid\x00" + someUUID + "\x00"
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
		pid, err := findQEMU(fakeProc(t, test.pidFile, test.exe, test.cmdline), "web", someUUID)
		switch {
		case test.wrong == "" && (err != nil || pid != 4711):
			t.Errorf("%s: got %d, %v", test.what, pid, err)
		case test.wrong != "" && (err == nil || !strings.Contains(err.Error(), test.wrong)):
			t.Errorf("%s: got %v, want %q", test.what, err, test.wrong)
		}
	}
}

// A shim that is there is given the policy, and none is started.
func TestServeWithShim(t *testing.T) {
	before := shims
	defer func() { shims = before }()
	shims = t.TempDir()
	f, err := startFakeShim(shims, control.Status{Name: "web", UUID: someUUID, Version: "fake", Mode: control.Relay, State: control.Correcting})
	if err != nil {
		t.Fatal(err)
	}
	defer f.stop()
	l := &live{domain: &domain{name: "web", uuid: someUUID}, pid: -1}
	var out strings.Builder
	p := &program{ui: &ui{stdout: &out}, ctx: t.Context()}
	policy := metadata.Default()
	policy.Reference = metadata.UTC
	if err := l.serve(p, policy); err != nil {
		t.Fatal(err)
	}
	if got := f.asked[len(f.asked)-1]; got.Do != "policy" || got.Clock != policy.XML() {
		t.Errorf("asked %+v", got)
	}
	const missed = "web: is paused, and this pause isn't caught up"
	l.paused = true
	if err := l.report(p); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), missed) {
		t.Errorf("the module was there when the pause began: %s", out.String())
	}
	l.fresh = true
	if err := l.report(p); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), missed) {
		t.Errorf("nothing about the pause: %s", out.String())
	}

	// Leaving the clock alone: a relay stays.
	said, err := l.leave(p)
	if err != nil || !strings.Contains(said, "relays the monitor until the domain stops") {
		t.Errorf("%q, %v", said, err)
	}
	if got := f.asked[len(f.asked)-1]; got.Do != "policy" || got.Clock != "" {
		t.Errorf("asked %+v", got)
	}
	// A watch goes. This fake can't.
	f.status.Mode = control.Watch
	if _, err := l.leave(p); err == nil || !strings.Contains(err.Error(), "fake doesn't know quit") {
		t.Errorf("%v", err)
	}
}
