package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/control"
)

func hostWith(t *testing.T, files map[string]string) examined {
	t.Helper()
	x := examined{root: t.TempDir()}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(x.path(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(x.path(path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

func wantFinding(t *testing.T, got finding, want grade, what string) {
	t.Helper()
	if got.grade != want || !strings.Contains(got.what, what) {
		t.Errorf("got %+v, want %s %q", got, want, what)
	}
	if got.grade != good && got.mend == "" {
		t.Errorf("nothing mends %+v", got)
	}
}

func TestHostChecks(t *testing.T) {
	const source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
	const available = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
	const release = "/proc/sys/kernel/osrelease"
	const scope = "/proc/sys/kernel/yama/ptrace_scope"
	type files = map[string]string
	for _, test := range []struct {
		files files
		check func(examined) finding
		want  grade
		what  string
	}{
		{files{source: "tsc\n"}, examined.checkClocksource, good, "tsc"},
		{files{source: "hpet\n", available: "tsc hpet acpi_pm\n"}, examined.checkClocksource, bad, "hpet"},
		{files{source: "kvm-clock\n"}, examined.checkClocksource, bad, "kvm-clock"},
		{nil, examined.checkClocksource, warn, "no such file"},
		{files{release: "6.1.0-13-amd64\n"}, examined.checkKernel, good, "Linux 6.1.0-13-amd64"},
		{files{release: "5.16\n"}, examined.checkKernel, good, "Linux 5.16"},
		{files{release: "5.15.0-91-generic\n"}, examined.checkKernel, warn, "5.15"},
		{files{release: "4.18.0\n"}, examined.checkKernel, warn, "4.18"},
		{files{scope: "1\n"}, examined.checkPtrace, good, "is 1"},
		{files{scope: "3\n"}, examined.checkPtrace, warn, "is 3"},
		{nil, examined.checkPtrace, good, "no Yama"},
		{nil, examined.checkAppArmor, good, "off"},
		{files{"/sys/module/apparmor/parameters/enabled": "Y\n"}, examined.checkAppArmor, good, "on"},
		{files{"/sys/module/apparmor/parameters/enabled": "N\n"}, examined.checkAppArmor, good, "off"},
		{nil, examined.checkSELinux, good, "off"},
		{files{"/sys/fs/selinux/enforce": "1"}, examined.checkSELinux, good, "enforcing"},
		{files{"/sys/fs/selinux/enforce": "0"}, examined.checkSELinux, good, "permissive"},
		{nil, examined.checkKVM, bad, "there is no /dev/kvm"},
		{files{"/dev/kvm": ""}, examined.checkKVM, good, "can be opened"},
	} {
		wantFinding(t, test.check(hostWith(t, test.files)), test.want, test.what)
	}
	wantFinding(t, judgeLibvirt(6_004_000), bad, "6.4.0")
	wantFinding(t, judgeLibvirt(6_005_000), good, "6.5.0")
	wantFinding(t, checkRoot(0), good, "root")
	wantFinding(t, checkRoot(1000), warn, "not running as root")
}

func TestTimer(t *testing.T) {
	const systemd, unit = "/run/systemd/system/x", "/usr/lib/systemd/system/ftclock-anchor.timer"
	for _, files := range []map[string]string{nil, {systemd: ""}, {unit: ""}} {
		if found := hostWith(t, files).checkTimer(); len(found) > 0 {
			t.Errorf("%v: %+v", files, found)
		}
	}
	files := map[string]string{systemd: "", unit: ""}
	wantFinding(t, hostWith(t, files).checkTimer()[0], warn, "isn't enabled")
	files["/etc/systemd/system/timers.target.wants/ftclock-anchor.timer"] = ""
	wantFinding(t, hostWith(t, files).checkTimer()[0], good, "is enabled")
}

func TestHook(t *testing.T) {
	x := hostWith(t, map[string]string{"/usr/sbin/ftclock-hook": ""})
	hook, link := x.path("/usr/sbin/ftclock-hook"), x.path(hookLink)
	wantFinding(t, x.checkHook()[0], bad, "isn't there")
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(hook, link); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook()[0], bad, "isn't a program that can be run")
	if err := os.Chmod(hook, 0o755); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook()[0], good, "is there")
	if err := os.Remove(hook); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook()[0], bad, "leads nowhere")
}

// A daemon that started before the hook was there, at boot + 50 s in 1970, may not know it.
func TestDaemonOlderThanHook(t *testing.T) {
	stat := "812 (virt) qemud) S " + strings.Repeat("0 ", 18) + "5000 0 0"
	x := hostWith(t, map[string]string{
		"/proc/stat": "cpu 1 2 3\nbtime 1000\n", "/proc/812/comm": "virtqemud\n", "/proc/812/stat": stat,
		"/proc/813/comm": "bash\n", hookLink: "",
	})
	if err := os.Chmod(x.path(hookLink), 0o755); err != nil {
		t.Fatal(err)
	}
	daemons := x.daemons()
	if len(daemons) != 1 || daemons[0].pid != 812 || !daemons[0].started.Equal(time.Unix(1050, 0)) {
		t.Fatalf("got %+v", daemons)
	}
	findings := x.checkHook()
	if len(findings) != 2 {
		t.Fatalf("got %+v", findings)
	}
	wantFinding(t, findings[1], warn, "virtqemud (pid 812) is older than the hook")
	for _, wrong := range []string{"", "1 (x) S", strings.Replace(stat, "5000", "-1", 1)} {
		if ticks, ok := startTicks(wrong); ok {
			t.Errorf("%q: got %d", wrong, ticks)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "libftclock-qemu.so")
	wantFinding(t, checkFile("module", path, nil, 0o444), bad, "no such file")
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, checkFile("module", path, nil, 0o444), bad, "has the mode")
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, checkFile("module", path, nil, 0o444), bad, "out of the reach of QEMU's user")
}

func TestStateDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the directory has to be root's; fix: run as root")
	}
	dir := t.TempDir()
	wantFinding(t, checkStateDir(filepath.Join(dir, "none"))[0], good, "isn't there yet")
	wantFinding(t, checkStateDir(dir)[0], good, "is there")
	if _, err := makeShimDir(dir, control.Info{Name: "a b", UUID: someUUID}); err != nil {
		t.Fatal(err)
	}
	findings := checkStateDir(dir)
	if len(findings) != 2 || !strings.Contains(findings[1].mend, "`ftclock enable --live 'a b'`") {
		t.Fatalf("got %+v", findings)
	}
	wantFinding(t, findings[1], warn, "the shim of a b ("+someUUID+") was killed or crashed")
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, checkStateDir(dir)[0], bad, "others than root")
}

// The programs are compiled here: what a distribution's own are like changes.
func TestIoctlSlots(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "p.c")
	if err := os.WriteFile(source, []byte("#include <sys/ioctl.h>\n"+
		"#ifdef NONE\nint main(void) { return 0; }\n"+
		"#else\nint main(void) { return ioctl(0, 0); }\n#endif\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		flags []string
		slots int
		now   bool
		wrong string
	}{
		{"now", []string{"-Wl,-z,now"}, 1, true, ""},
		{"late", []string{"-Wl,-z,lazy"}, 1, false, ""},
		{"no plt", []string{"-fno-plt", "-Wl,-z,now"}, 1, true, ""},
		{"none", []string{"-DNONE", "-Wl,-z,now"}, 0, true, ""},
		{"static", []string{"-static"}, 0, false, "statically"},
	} {
		out := filepath.Join(dir, test.name)
		cc := exec.Command("cc", append(test.flags, "-O1", "-o", out, source)...)
		if text, err := cc.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", test.name, err, text)
		}
		slots, now, err := ioctlSlots(out)
		if test.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), test.wrong) {
				t.Errorf("%s: got %v, want %q", test.name, err, test.wrong)
			}
			continue
		}
		if err != nil || slots != test.slots || now != test.now {
			t.Errorf("%s: got %d slots, bound at the start %t (%v)", test.name, slots, now, err)
		}
	}
	if _, _, err := ioctlSlots(source); err == nil {
		t.Error("C source passes for a program")
	}
	wantFinding(t, checkEmulator(source), bad, "bad magic number")
	wantFinding(t, checkEmulator(filepath.Join(dir, "none")), bad, "no place for the module")
	wantFinding(t, checkEmulator(filepath.Join(dir, "late")), bad, "binds its slots late")
	wantFinding(t, checkEmulator(filepath.Join(dir, "now")), good, "has a slot for ioctl")
}

func TestPrintFindings(t *testing.T) {
	var out strings.Builder
	u := &ui{stdout: &out}
	if printFindings(u, []finding{{good, "fine", ""}, {warn, "hm", "do that"}}) {
		t.Error("bad without anything bad")
	}
	if !printFindings(u, []finding{{bad, "no", "do this"}}) {
		t.Error("not bad")
	}
	if want := "ok   fine\nwarn hm\n       do that\nbad  no\n       do this\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
