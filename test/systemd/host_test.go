package systemd

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/container"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

const (
	uuid     = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	unit     = "ftclock-shim@" + uuid + ".service"
	name     = "web1"
	patience = time.Minute
)

// host is a container with ftclock installed, and a domain defined.
type host struct {
	*container.Container
	t *testing.T
}

// boot boots a container that goes with the test.
func boot(t *testing.T, metadata string, o container.Options) *host {
	t.Helper()
	if missing := container.Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	c := check.Value(container.Start(container.Suite(), o))(t)
	h := &host{c, t}
	t.Cleanup(func() {
		if t.Failed() && c.Running() {
			journal, _ := c.Run("journalctl", "--no-pager", "-n", "80")
			t.Log(journal)
		}
		c.Close()
	})
	h.install("")
	check.Value(guest.Copy(h.Path("/var/lib")))(t)
	x := privatelibvirt.GuestXML(name, "/var/lib/guest.elf")
	x.UUID = uuid
	privatelibvirt.Manage(x, metadata)
	check.NoError(t, os.WriteFile(h.Path("/root/domain.xml"), []byte(check.Value(x.Marshal())(t)), 0o600))
	h.must("systemctl", "daemon-reload")
	h.must("systemctl", "restart", "libvirtd")
	h.must("virsh", "define", "/root/domain.xml")
	return h
}

const clockElement = privatelibvirt.ClockElement

// install installs the tree's ftclock; with the shim of another version (see package built) if one is named.
func (h *host) install(shim string) {
	h.t.Helper()
	args := []string{"-s", "-C", "../..", "-o", "build", "install", "DESTDIR=" + h.Path("/"), "PREFIX=/usr", "SYSCONFDIR=/etc"}
	check.Output(h.t, exec.Command("make", args...))
	if shim == "" {
		return
	}
	check.NoError(h.t, os.Rename(check.Value(built.Copy(shim, h.Path("/usr/sbin")))(h.t), h.Path("/usr/sbin/ftclock-shim")))
}

// must runs a command inside, which has to succeed, and gives what it prints.
func (h *host) must(args ...string) string {
	h.t.Helper()
	return check.Value(h.Run(args...))(h.t)
}

// property is one of the unit's.
func (h *host) property(name string) string {
	h.t.Helper()
	return strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", name, unit))
}

// eventually waits for what has to come.
func (h *host) eventually(what string, holds func() bool) {
	h.t.Helper()
	check.Await(h.t, patience, 20*time.Millisecond, holds, "%s", what)
}

// shim waits until the shim is there, and gives its status. Its pids are the container's.
func (h *host) shim() *control.Status {
	h.t.Helper()
	var s *control.Status
	h.eventually("the shim", func() bool {
		answer, err := control.Ask(h.Path(control.Dir), uuid, control.Request{Do: "status"})
		s = answer.Status
		return err == nil && h.Outside(s.Shim) != 0
	})
	return s
}

// group is the control group of a process of the container's.
func (h *host) group(pid int) string {
	h.t.Helper()
	text := check.Value(os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/cgroup", pid))))(h.t)
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(path)
		}
	}
	h.t.Fatalf("process %d has no control group:\n%s", pid, text)
	return ""
}

// inUnit checks that the unit is up, with the shim in it.
func (h *host) inUnit() *control.Status {
	h.t.Helper()
	s := h.shim()
	if group := h.group(s.Shim); s.Keeper != 0 || !strings.HasSuffix(group, "/system.slice/"+unit) {
		h.t.Errorf("process %d is in %s, and its keeper is %d", s.Shim, group, s.Keeper)
	}
	if state := h.property("ActiveState"); state != "active" {
		h.t.Errorf("the unit is %s", state)
	}
	return s
}

func (h *host) qemu() int {
	h.t.Helper()
	text := check.Value(os.ReadFile(h.Path("/run/libvirt/qemu/" + name + ".pid")))(h.t)
	return check.Value(strconv.Atoi(strings.TrimSpace(string(text))))(h.t)
}

// readOnly checks that a process in a sandbox can write to none of the directories, whatever else it may.
func (h *host) readOnly(pid string, dirs ...string) {
	h.t.Helper()
	for _, dir := range dirs {
		if out, err := h.Run("nsenter", "-t", pid, "-m", "touch", dir+"/x"); err == nil || !strings.Contains(out, "Read-only file system") {
			h.t.Errorf("process %s could write to %s: %v", pid, dir, err)
		}
	}
}

// clock is the running guest's.
func (h *host) clock() *guest.Clock {
	h.t.Helper()
	return domaintest.ClockOfProcess(h.t, h.Outside(h.qemu()))
}

// kept checks that the guest lost nothing while f ran.
func (h *host) kept(what string, c *guest.Clock, f func()) {
	h.t.Helper()
	before := domaintest.Offset(h.t, c)
	f()
	h.t.Logf("%s: drift of %d ns", what, domaintest.Kept(h.t, c, before, "%s: drift", what))
}

// checkpoints begins count checkpoints of 5 ms through libvirtd; the function that it returns waits for their end.
func (h *host) checkpoints(count int) (wait func()) {
	h.t.Helper()
	cmd := h.Command("ftclock", "exercise", name, "--rate", "20", "--pause", "5", "--count", strconv.Itoa(count))
	done := make(chan error, 1)
	var out []byte
	go func() {
		var err error
		out, err = cmd.CombinedOutput()
		done <- err
	}()
	return func() {
		h.t.Helper()
		if err := <-done; err != nil {
			h.t.Errorf("%d checkpoints: %v\n%s", count, err, out)
		}
	}
}

// shims are the container's processes that run the shim's program.
func (h *host) shims() (pids []string) {
	all, _ := filepath.Glob(h.Path("/proc/[0-9]*/exe"))
	for _, exe := range all {
		if target, err := os.Readlink(exe); err == nil && strings.HasPrefix(filepath.Base(target), "ftclock-shim") {
			pids = append(pids, filepath.Base(filepath.Dir(exe)))
		}
	}
	return pids
}

// nothingLeft checks that the unit has ended well, and that nothing of the shim's is there.
func (h *host) nothingLeft() {
	h.t.Helper()
	h.eventually("the unit's end", func() bool {
		state := h.property("ActiveState")
		return state == "inactive" || state == "failed"
	})
	if state, result := h.property("ActiveState"), h.property("Result"); state != "inactive" || result != "success" {
		h.t.Errorf("the unit is %s: %s", state, result)
	}
	h.nothingRuns()
}

func (h *host) nothingRuns() {
	h.t.Helper()
	h.eventually("the shim's end", func() bool { return len(h.shims()) == 0 })
	for _, pattern := range []string{control.Dir + "/*", "/var/lib/libvirt/qemu/domain-*"} {
		if left, _ := filepath.Glob(h.Path(pattern)); len(left) > 0 {
			h.t.Errorf("left: %v", left)
		}
	}
}
