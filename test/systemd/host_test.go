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
	"ftclock/test/container"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

const (
	uuid     = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	unit     = "ftclock-shim@" + uuid + ".service"
	name     = "web1"
	patience = time.Minute
	maxDrift = 10_000 // ns: what a guest may be off after any number of checkpoints
)

// host is a container with ftclock installed, and a domain defined.
type host struct {
	*container.Container
	t *testing.T
}

// suite is the Debian that boots.
func suite() string {
	if s := os.Getenv("FTCLOCK_SUITE"); s != "" {
		return s
	}
	return container.Debian12
}

// boot boots a container that goes with the test.
func boot(t *testing.T, metadata string, o container.Options) *host {
	t.Helper()
	if missing := container.Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	c, err := container.Start(suite(), o)
	if err != nil {
		t.Fatal(err)
	}
	h := &host{c, t}
	t.Cleanup(func() {
		if t.Failed() && c.Running() {
			journal, _ := c.Run("journalctl", "--no-pager", "-n", "80")
			t.Log(journal)
		}
		c.Close()
	})
	h.install("")
	if _, err := guest.Copy(h.Path("/var/lib")); err != nil {
		t.Fatal(err)
	}
	x := privatelibvirt.GuestXML(name, "/var/lib/guest.elf")
	x.UUID = uuid
	if metadata != "" {
		x.Metadata = &libvirtxml.DomainMetadata{XML: metadata}
	}
	text, err := x.Marshal()
	if err == nil {
		err = os.WriteFile(h.Path("/root/domain.xml"), []byte(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.must("systemctl", "daemon-reload")
	h.must("systemctl", "restart", "libvirtd")
	h.must("virsh", "define", "/root/domain.xml")
	return h
}

const clockElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`

// install installs the tree's ftclock; with the shim of another version (see package built) if one is named.
func (h *host) install(shim string) {
	h.t.Helper()
	args := []string{"-s", "-C", "../..", "-o", "build", "install", "DESTDIR=" + h.Path("/"), "PREFIX=/usr", "SYSCONFDIR=/etc"}
	if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
		h.t.Fatalf("installing: %v\n%s", err, out)
	}
	if shim == "" {
		return
	}
	copied, err := built.Copy(shim, h.Path("/usr/sbin"))
	if err == nil {
		err = os.Rename(copied, h.Path("/usr/sbin/ftclock-shim"))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// must runs a command inside, which has to succeed, and gives what it prints.
func (h *host) must(args ...string) string {
	h.t.Helper()
	out, err := h.Run(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// property is one of the unit's.
func (h *host) property(name string) string {
	h.t.Helper()
	return strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", name, unit))
}

// eventually waits for what has to come.
func (h *host) eventually(what string, holds func() bool) {
	h.t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("in vain waited for: %s", what)
		}
	}
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
	text, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/cgroup", pid)))
	if err != nil {
		h.t.Fatal(err)
	}
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
	text, err := os.ReadFile(h.Path("/run/libvirt/qemu/" + name + ".pid"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		h.t.Fatal(err)
	}
	return pid
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
	c, err := guest.Open(h.Outside(h.qemu()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	if err := c.WaitMoving(2 * time.Minute); err != nil {
		h.t.Fatal(err)
	}
	return c
}

func (h *host) offset(c *guest.Clock) int64 {
	h.t.Helper()
	o, err := c.SettledOffset()
	if err != nil {
		h.t.Fatal(err)
	}
	return o
}

// kept checks that the guest lost nothing while f ran.
func (h *host) kept(what string, c *guest.Clock, f func()) {
	h.t.Helper()
	before := h.offset(c)
	f()
	drift := h.offset(c) - before
	h.t.Logf("%s: drift of %d ns", what, drift)
	if drift > maxDrift || drift < -maxDrift {
		h.t.Errorf("%s: drift of %d ns", what, drift)
	}
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
