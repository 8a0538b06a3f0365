package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/host"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/hang"
	"ftclock/test/privatelibvirt"
)

// holds checks that a domain's clock holds over that many checkpoints.
func holds(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock, checkpoints int) {
	t.Helper()
	before := offset(t, clock)
	pauses(t, d, checkpoints, 5*time.Millisecond)
	check.Within(t, offset(t, clock)-before, maxDrift, "drift")
}

// mounted hides a directory behind a small memory file system for the length of the test.
func mounted(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	check.NoError(t, os.MkdirAll(dir, 0o711))
	check.NoError(t, unix.Mount("ftclock-test", dir, "tmpfs", flags, "size=64k,mode=711"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// Where the records are on a disk that hangs, as NFS does, or is read-only, a domain starts, is served, saved and ended like any other, and the
// log says once what is wrong.
func TestKVMABadDiskUnderTheRecords(t *testing.T) {
	const dir = host.DataDir
	check.NoError(t, os.MkdirAll(dir, 0o700))
	run := func(t *testing.T, name, problem, logged string) {
		d, clock := start(t, managed(name, clockElement))
		holds(t, d, clock, 20)
		if s := status(t, d); s.State != control.Correcting || s.Kept != nil && !strings.Contains(s.Kept.Problem, problem) {
			t.Errorf("status: %s, %+v", s.State, s.Kept)
		}
		ended(t, d)
		log := shimLog(name)
		if strings.Contains(log, "a cont goes on without the module") || strings.Count(log, logged) != 1 {
			t.Errorf("the log:\n%s", log)
		}
	}
	t.Run("read-only", func(t *testing.T) {
		mounted(t, dir, unix.MS_RDONLY)
		run(t, "read-only", "read-only file system", "the record of this clock isn't kept")
	})
	t.Run("hangs", func(t *testing.T) {
		end := check.Value(hang.Mount(dir))(t)
		defer end()
		run(t, "hangs", "doesn't answer", "no record is kept, and no reading")
	})
}

// A worker that takes over while /run is full serves on, and can be asked.
func TestKVMNoRoomInRun(t *testing.T) {
	mounted(t, control.Dir, 0)
	d, clock := start(t, managed("cramped", clockElement))
	uuid := domaintest.UUID(t, d)
	if err := os.Remove(filepath.Join(control.Dir, uuid, control.InfoName)); err != nil { // what it has room for already
		t.Fatal(err)
	}
	full := filepath.Join(control.Dir, "full")
	if err := os.WriteFile(full, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	holds(t, d, clock, 10)
	first := status(t, d)
	check.NoError(t, unix.Kill(first.Shim, unix.SIGKILL))
	holds(t, d, clock, 10)
	if s := status(t, d); s.State != control.Correcting || s.Workers != first.Workers+1 || s.Pauses != first.Pauses+10 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	if n := strings.Count(shimLog("cramped"), "make room in /run"); n != 1 {
		t.Errorf("it is logged %d times:\n%s", n, shimLog("cramped"))
	}
	check.NoError(t, os.Remove(full))
}

// While libvirtd is stopped, an engine with a monitor of its own goes on: QEMU's events fill what there is between it and libvirtd, and
// neither the guest's clock nor the record notices. libvirtd goes on where it was.
func TestKVMAStoppedLibvirtd(t *testing.T) {
	d, clock, monitor := startWithMonitor(t, "deaf")
	before := offset(t, clock)
	check.NoError(t, unix.Kill(privatelibvirt.PID(), unix.SIGSTOP))
	stopped := true
	goOn := func() {
		if stopped {
			_ = unix.Kill(privatelibvirt.PID(), unix.SIGCONT)
		}
		stopped = false
	}
	defer goOn()
	pauses := 0
	checkpoints := func(n int) {
		for range n {
			execute(t, monitor, "stop", nil)
			execute(t, monitor, "cont", nil)
			time.Sleep(10 * time.Millisecond)
			pauses++
		}
	}
	const unread = "libvirt doesn't read what QEMU says"
	for end := time.Now().Add(5 * time.Minute); !strings.Contains(shimLog("deaf"), unread); checkpoints(10) {
		if time.Now().After(end) {
			t.Fatalf("after %d checkpoints nobody has noticed:\n%s", pauses, shimLog("deaf"))
		}
	}
	time.Sleep(3 * time.Second)
	checkpoints(300) // more than the module's ring has room for
	check.Within(t, offset(t, clock)-before, maxDrift, "drift after %d checkpoints", pauses)
	time.Sleep(2 * time.Second)
	s := status(t, d)
	if s.State != control.Correcting || s.Disagreements != 0 || s.Kept == nil || s.Kept.Pauses != s.Pauses || s.Kept.Missed != 0 || s.Pauses < uint64(pauses) {
		t.Errorf("%d checkpoints; status: %+v, %+v", pauses, withoutRecords(s), s.Kept)
	}
	goOn()
	// Its answer comes behind the events of all those checkpoints: until libvirtd has heard them, it takes the domain for paused or not by them.
	mustVirsh(t, "qemu-monitor-command", "deaf", "--hmp", "info status")
	holds(t, d, clock, 10)
	if n := strings.Count(shimLog("deaf"), unread); n != 1 {
		t.Errorf("it is logged %d times:\n%s", n, shimLog("deaf"))
	}
}
