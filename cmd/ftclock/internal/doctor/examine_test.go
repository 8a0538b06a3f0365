package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/test/hang"
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

func wantFinding(t *testing.T, got Finding, want grade, what string) {
	t.Helper()
	if got.grade != want || !strings.Contains(got.what, what) {
		t.Errorf("got %+v, want %s %q", got, want, what)
	}
	if got.grade != good && got.fix == "" {
		t.Errorf("nothing fixes %+v", got)
	}
}

func TestHostChecks(t *testing.T) {
	const source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
	const available = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
	const release = "/proc/sys/kernel/osrelease"
	type files = map[string]string
	for _, test := range []struct {
		files files
		check func(examined) Finding
		want  grade
		what  string
	}{
		{files{source: "tsc\n"}, examined.checkClocksource, good, "tsc"},
		{files{source: "hyperv_clocksource_tsc_page\n"}, examined.checkClocksource, good, "tsc_page"},
		{files{source: "hpet\n", available: "tsc hpet acpi_pm\n"}, examined.checkClocksource, bad, "hpet"},
		{files{source: "kvm-clock\n"}, examined.checkClocksource, bad, "kvm-clock"},
		{nil, examined.checkClocksource, warn, "no such file"},
		{files{release: "6.1.0-13-amd64\n"}, examined.checkKernel, good, "Linux 6.1.0-13-amd64"},
		{files{release: "5.16\n"}, examined.checkKernel, good, "Linux 5.16"},
		{files{release: "5.15.0-91-generic\n"}, examined.checkKernel, warn, "5.15"},
		{files{release: "4.18.0\n"}, examined.checkKernel, warn, "4.18"},
		{nil, examined.checkSELinux, good, "off"},
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
	wantFinding(t, x.checkHook(), bad, "isn't there")
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(hook, link); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook(), bad, "isn't a program that can be run")
	if err := os.Chmod(hook, 0o755); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook(), good, "is there")
	if err := os.Remove(hook); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, x.checkHook(), bad, "leads nowhere")
}

func TestStateDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the directory has to be root's; fix: run as root")
	}
	dir := t.TempDir()
	wantFinding(t, checkStateDir(filepath.Join(dir, "none"))[0], good, "isn't there yet")
	wantFinding(t, checkStateDir(dir)[0], good, "is there")
	if _, err := fakeshim.MakeDir(dir, control.Info{Name: "a b", UUID: fakeshim.UUID}); err != nil {
		t.Fatal(err)
	}
	findings := checkStateDir(dir)
	if len(findings) != 2 || !strings.Contains(findings[1].fix, "`ftclock enable --live 'a b'`") {
		t.Fatalf("got %+v", findings)
	}
	wantFinding(t, findings[1], warn, "the shim of a b ("+fakeshim.UUID+") was killed or crashed")
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, checkStateDir(dir)[0], bad, "others than root")
}

func TestPrintFindings(t *testing.T) {
	var out strings.Builder
	u := &ui.UI{Stdout: &out}
	if Print(u, []Finding{{good, "fine", ""}, {warn, "hm", "do that"}}) {
		t.Error("bad without anything bad")
	}
	if !Print(u, []Finding{{bad, "no", "do this"}}) {
		t.Error("not bad")
	}
	if want := "ok   fine\nwarn hm\n       do that\nbad  no\n       do this\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// A domain that was managed and runs without our metadata is told of.
func TestForgotten(t *testing.T) {
	at := status.Dirs{Libvirt: t.TempDir(), Records: t.TempDir(), Shims: t.TempDir()}
	if found := checkForgotten(at); len(found) != 0 {
		t.Errorf("without one: %+v", found)
	}
	if err := fakeshim.Forget(at.Libvirt, at.Records, "web1", fakeshim.UUID); err != nil {
		t.Fatal(err)
	}
	if found := checkForgotten(at); len(found) != 1 {
		t.Errorf("got %+v", found)
	} else {
		wantFinding(t, found[0], bad, "web1 runs uncorrected: it was managed")
	}
}

func TestForgottenOnADiskThatHangs(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	at := status.Dirs{Libvirt: t.TempDir(), Records: t.TempDir(), Shims: t.TempDir()}
	if err := fakeshim.Forget(at.Libvirt, at.Records, "web1", fakeshim.UUID); err != nil {
		t.Fatal(err)
	}
	at.Records = hang.Dir(t)
	if found := checkForgotten(at); len(found) != 1 {
		t.Errorf("got %+v", found)
	} else {
		wantFinding(t, found[0], bad, "its disk hangs")
	}
}
