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

	"ftclock/test/check"
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
	elf := check.Value(guest.Copy(Dir))(t)
	conn := check.Value(Connect())(t)
	x := GuestXML("private", elf)
	check.Value(AddMonitor(x))(t)
	x.Metadata = &libvirtxml.DomainMetadata{XML: `<test:mark xmlns:test="urn:ftclock:test">kept</test:mark>`}
	d := check.Value(Define(conn, x))(t)
	if err := d.Create(); err != nil {
		t.Fatal(err, Log("private"))
	}
	pid := check.Value(d.PID())(t)
	var st unix.Stat_t
	check.NoError(t, unix.Stat(fmt.Sprintf("/proc/%d", pid), &st))
	if u, err := user.LookupId(fmt.Sprint(st.Uid)); err != nil || (u.Username != "libvirt-qemu" && u.Username != "qemu") {
		t.Errorf("QEMU runs as user %v: %v", u, err)
	}
	if out, err := Virsh("dumpxml", "private"); err != nil || !strings.Contains(out, `<test:mark xmlns:test="urn:ftclock:test">kept</test:mark>`) {
		t.Errorf("metadata is gone: %v\n%s", err, out)
	}
	clock := check.Value(d.Clock())(t)
	defer clock.Close()

	for _, end := range []func() error{Stop, Kill} {
		check.NoError(t, end())
		if _, err := clock.Sample(); err != nil {
			t.Errorf("guest without libvirtd: %v", err)
		}
		check.NoError(t, Start())
		if out, err := Virsh("domstate", "private"); err != nil || strings.TrimSpace(out) != "running" {
			t.Errorf("after libvirtd's restart: %q, %v", out, err)
		}
	}

	monitor := check.Value(d.Monitor())(t)
	defer monitor.Close()
	if _, err := monitor.Execute("stop", nil); err != nil {
		t.Error(err)
	}
	// A guest that was stopped within an update stays torn. One that runs publishes thousands of times a second.
	first, torn := clock.Read()
	time.Sleep(3 * time.Second)
	if second, err := clock.Read(); !errors.Is(err, torn) || second.Sequence != first.Sequence {
		t.Errorf("clock moves in a stopped guest: %+v, then %+v, %v", first, second, err)
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
	self := check.Value(os.Executable())(t)
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
	self := check.Value(os.Executable())(t)
	for _, c := range []struct {
		signal unix.Signal
		group  bool // as Ctrl-C does
	}{{unix.SIGKILL, false}, {unix.SIGTERM, false}, {unix.SIGINT, false}, {unix.SIGINT, true}} {
		before := settledDaemons(t)
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), exitVariable+"=killed")
		// A process group of its own, as a terminal's foreground job has.
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		check.NoError(t, cmd.Start())
		wait(t, "libvirtd inside", func() bool { return daemons(t) > before })
		target := cmd.Process.Pid
		if c.group {
			target = -target
		}
		check.NoError(t, unix.Kill(target, c.signal))
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
	comms := check.Value(filepath.Glob("/proc/[0-9]*/comm"))(t)
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
	check.Await(t, 5*time.Minute, 20*time.Millisecond, done, "%s", what)
}

func TestInstallNeedsEveryPart(t *testing.T) {
	repo := t.TempDir()
	makefile := "install:\n\tmkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d\n\ttouch $(DESTDIR)$(PREFIX)/bin/ftclock\n"
	check.NoError(t, os.WriteFile(filepath.Join(repo, "Makefile"), []byte(makefile), 0o644))
	err := Install(repo)
	if err == nil || !strings.Contains(err.Error(), "ftclock-hook") {
		t.Errorf("installing half: %v", err)
	}
}
