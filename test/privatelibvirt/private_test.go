package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/test/guest"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"
)

const (
	exitVariable = "FTCLOCK_TEST_EXIT"
	markVariable = "FTCLOCK_TEST_MARK"
)

func TestMain(m *testing.M) {
	inner := m.Run
	switch os.Getenv(exitVariable) {
	case "7":
		inner = func() int { return 7 }
	case "killed":
		inner = func() int { select {} }
	}
	os.Exit(Main(inner, Options{Prepare: func() error {
		if mark := os.Getenv(markVariable); mark != "" {
			return os.WriteFile(mark, nil, 0o644)
		}
		return nil
	}}))
}

// Everything at once: a domain of the private libvirt, its QEMU's user, the
// second monitor, and libvirtd's restarts under it.
func TestKVMDomain(t *testing.T) {
	elf, err := guest.Copy(Dir)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := Connect()
	if err != nil {
		t.Fatal(err)
	}
	x := GuestXML("private", elf)
	if _, err := AddMonitor(x); err != nil {
		t.Fatal(err)
	}
	x.Metadata = &libvirtxml.DomainMetadata{XML: `<test:mark xmlns:test="urn:ftclock:test">kept</test:mark>`}
	d, err := Define(conn, x)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Create(); err != nil {
		t.Fatal(err, Log("private"))
	}
	pid, err := d.PID()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		t.Fatal(err)
	}
	if u, err := user.LookupId(fmt.Sprint(st.Uid)); err != nil || (u.Username != "libvirt-qemu" && u.Username != "qemu") {
		t.Errorf("QEMU runs as user %v: %v", u, err)
	}
	if out, err := Virsh("dumpxml", "private"); err != nil || !strings.Contains(out, `<test:mark xmlns:test="urn:ftclock:test">kept</test:mark>`) {
		t.Errorf("metadata is gone: %v\n%s", err, out)
	}
	clock, err := d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	defer clock.Close()

	for _, end := range []func() error{Stop, Kill} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if _, err := clock.Sample(); err != nil {
			t.Errorf("guest without libvirtd: %v", err)
		}
		if err := Start(); err != nil {
			t.Fatal(err)
		}
		if out, err := Virsh("domstate", "private"); err != nil || strings.TrimSpace(out) != "running" {
			t.Errorf("after libvirtd's restart: %q, %v", out, err)
		}
	}

	monitor, err := d.Monitor()
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	if _, err := monitor.Execute("stop", nil); err != nil {
		t.Error(err)
	}
	if _, err := clock.Sample(); err == nil {
		t.Error("clock moves in a stopped guest")
	}
	if _, err := monitor.Execute("cont", nil); err != nil {
		t.Error(err)
	}
	if err := clock.WaitMoving(time.Minute); err != nil {
		t.Error(err)
	}

	// The old connection died with libvirtd.
	if out, err := Virsh("destroy", "private"); err != nil {
		t.Error(out, err)
	}
	// Process 1 reaps it: libvirt has seen it go.
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("QEMU %d after destroy: %v", pid, err)
	}
	if out, err := Virsh("undefine", "private"); err != nil {
		t.Error(out, err)
	}
}

// The namespaces hold what is written where an installation and libvirt write,
// and the exit code gets out. The outside is, here, the private libvirt that
// this test itself runs in.
func TestNothingGetsOut(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	mark := "/etc/libvirt/mark-of-the-inside"
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), exitVariable+"=7", markVariable+"="+mark)
	cmd.Stderr = os.Stderr
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit of a private libvirt that returns 7: %v", err)
	}
	if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is seen outside: %v", mark, err)
	}
	if out, err := Virsh("version"); err != nil {
		t.Error(out, err)
	}
}

// A killed test takes everything with it.
func TestKilled(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		signal unix.Signal
		group  bool // as Ctrl-C does
	}{{unix.SIGKILL, false}, {unix.SIGTERM, false}, {unix.SIGINT, false}, {unix.SIGINT, true}} {
		before := settledDaemons(t)
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), exitVariable+"=killed")
		// A process group of its own, as a terminal's foreground job has.
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		wait(t, "libvirtd inside", func() bool { return daemons(t) > before })
		target := cmd.Process.Pid
		if c.group {
			target = -target
		}
		if err := unix.Kill(target, c.signal); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code == 0 {
			t.Errorf("exit code after %v: %d", c.signal, code)
		}
		wait(t, "end of libvirtd inside", func() bool { return daemons(t) == before })
	}
}

// daemons counts the libvirtds that are seen from here.
func daemons(t *testing.T) int {
	t.Helper()
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range comms {
		if comm, err := os.ReadFile(path); err == nil && string(comm) == "libvirtd\n" {
			n++
		}
	}
	return n
}

// settledDaemons counts them when their number stays: those of the test before may not have ended, and a child of one has its name
// until it is another program.
func settledDaemons(t *testing.T) (n int) {
	t.Helper()
	const looks = 25
	alike := 0
	wait(t, "libvirtds that stay", func() bool {
		now := daemons(t)
		if alike++; now != n {
			n, alike = now, 0
		}
		return alike >= looks
	})
	return n
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waiting for %s", what)
		}
	}
}

func TestInstallNeedsEveryPart(t *testing.T) {
	repo := t.TempDir()
	makefile := "install:\n\tmkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d\n\ttouch $(DESTDIR)$(PREFIX)/bin/ftclock\n"
	if err := os.WriteFile(filepath.Join(repo, "Makefile"), []byte(makefile), 0o644); err != nil {
		t.Fatal(err)
	}
	err := Install(repo)
	if err == nil || !strings.Contains(err.Error(), "ftclock-hook") {
		t.Errorf("installing half: %v", err)
	}
}
