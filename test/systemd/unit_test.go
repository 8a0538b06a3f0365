package systemd

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"ftclock/control"
	machine "ftclock/host"
	"ftclock/test/check"
	"ftclock/test/container"

	"golang.org/x/sys/unix"
)

func TestKVMTheShimHasItsUnit(t *testing.T) {
	h := boot(t, clockElement, container.Options{})
	h.must("virsh", "start", name)
	first := h.inUnit()
	if first.State != control.Correcting || first.Mode != control.Relay {
		t.Errorf("status: %+v", first)
	}
	if group := h.group(h.qemu()); !strings.Contains(group, "machine.slice") {
		t.Errorf("QEMU is in %s: the container isn't like a host", group)
	}
	clock := h.clock()
	h.kept("200 checkpoints", clock, func() { h.checkpoints(200)() })
	// What the unit may not do shows here: asking for the host's clock, and writing the record.
	if s := h.inUnit(); s.Kept == nil || s.Kept.Host.Samples == 0 || s.Kept.Pauses < 200 || s.Kept.Problem != "" {
		t.Errorf("the record: %+v", s.Kept)
	}
	if out := h.must("journalctl", "-u", unit, "-p", "warning", "--no-pager", "-q", "-o", "cat"); out != "" {
		t.Errorf("warnings: %s", out)
	}
	h.readOnly(strconv.Itoa(first.Shim), "/run", "/var/lib", "/etc", "/usr")
	h.confined(strconv.Itoa(first.Shim), shimCapabilities)
	exposure := h.must("sh", "-c", "systemd-analyze security --no-pager "+unit+" | tail -n 1")
	t.Logf("%s", exposure)
	if container.Suite() == container.Debian12 && !strings.Contains(exposure, unit+": 2.4 OK") { // what docs/systemd.md says of systemd 252
		t.Errorf("systemd-analyze says %q", exposure)
	}
	t.Logf("%s", h.must("systemctl", "status", "--no-pager", unit))

	h.must("virsh", "destroy", name)
	h.nothingLeft()
	for range 3 { // at once, and again
		h.must("virsh", "start", name)
		h.inUnit()
		h.must("virsh", "destroy", name)
	}
	h.nothingLeft()
}

// shimCapabilities are CAP_DAC_OVERRIDE, CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE.
const shimCapabilities = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_CHECKPOINT_RESTORE

// confined checks that a process has these capabilities at most, the unit's filter of system calls, and no way to more.
func (h *host) confined(pid string, capabilities uint64) {
	h.t.Helper()
	status := h.must("cat", "/proc/"+pid+"/status")
	for _, line := range []string{fmt.Sprintf("CapEff:\t%016x", capabilities), fmt.Sprintf("CapBnd:\t%016x", capabilities), "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, "\n"+line+"\n") {
			h.t.Errorf("no line %q in:\n%s", line, status)
		}
	}
}

func TestKVMALiveDomainHasItsUnit(t *testing.T) {
	h := boot(t, "", container.Options{})
	h.must("virsh", "start", name)
	clock := h.clock()
	h.must("ftclock", "enable", name, "--live")
	if s := h.inUnit(); s.State != control.Correcting || s.Mode != control.Watch {
		t.Errorf("status: %+v", s)
	}
	h.kept("20 checkpoints", clock, func() { h.checkpoints(20)() })
	h.must("ftclock", "disable", name, "--live")
	h.nothingRunsButQEMU()
	// Another name, the same QEMU: as one that libvirt didn't start.
	pid := strings.TrimSpace(h.must("cat", "/run/libvirt/qemu/"+name+".pid"))
	h.must("ftclock", "attach", pid)
	if out := h.must("systemctl", "list-units", "--no-legend", "--plain", "ftclock-shim@*"); !strings.Contains(out, "ftclock-shim@pid-"+pid+"-") {
		t.Errorf("units:\n%s", out)
	}
	h.kept("20 checkpoints of a process", clock, func() { h.checkpoints(20)() })
	h.must("ftclock", "detach", pid)
	h.nothingRunsButQEMU()
	h.must("virsh", "destroy", name)
	h.nothingLeft()
}

func (h *host) nothingRunsButQEMU() {
	h.t.Helper()
	h.eventually("the shim's end", func() bool { return len(h.shims()) == 0 })
	h.eventually("the unit's end", func() bool {
		out := h.must("systemctl", "list-units", "--no-legend", "--plain", "ftclock-shim@*")
		return strings.TrimSpace(out) == ""
	})
}

func TestKVMAUnitThatFails(t *testing.T) {
	h := boot(t, clockElement, container.Options{})
	const module, logrotate = "/usr/lib/ftclock/libftclock-qemu.so", "/etc/logrotate.d/ftclock"
	h.must("mv", module, module+".away")
	out, err := h.Run("virsh", "start", name)
	if err == nil || !strings.Contains(out, "libftclock-qemu.so") || !strings.Contains(out, "journalctl -u "+unit) {
		t.Errorf("without the module: %v", err)
	}
	t.Log(strings.TrimSpace(out))
	h.nothingRuns()
	if state := h.must("virsh", "domstate", name); !strings.Contains(state, "shut off") {
		t.Errorf("the domain is %s", state)
	}
	h.must("mv", module+".away", module)
	h.must("virsh", "start", name) // no limit on starts, no failed unit in the way
	h.inUnit()
	h.must("virsh", "destroy", name)
	h.nothingLeft()

	// systemd can't make the sandbox: the domain starts all the same, and the log says so.
	h.dropIn("[Service]\nReadWritePaths=/nonexistent\n")
	h.must("virsh", "start", name)
	s := h.shim()
	if group := h.group(s.Shim); s.Keeper == 0 || strings.Contains(group, "ftclock-shim@") {
		t.Errorf("the shim of keeper %d is in %s", s.Keeper, group)
	}
	log, err := os.ReadFile(h.Path(machine.LogDir + "/" + name + ".log"))
	if err != nil || !strings.Contains(string(log), "starting the shim without "+unit) {
		t.Errorf("noted: %v\n%s", err, log)
	}
	if pids := h.shims(); len(pids) != 2 {
		t.Errorf("processes of the shim: %v", pids)
	}
	// The log is cut under the shim, which goes on at its beginning.
	h.must("logrotate", "-d", logrotate)
	h.must("logrotate", "-f", logrotate)
	h.must("virsh", "destroy", name)
	h.nothingRuns()
	if kept := h.must("zcat", machine.LogDir+"/"+name+".log.1.gz"); !strings.Contains(kept, "starting the shim without "+unit) {
		t.Errorf("the log that was kept:\n%s", kept)
	}
	log, err = os.ReadFile(h.Path(machine.LogDir + "/" + name + ".log"))
	if err != nil || !strings.HasPrefix(string(log), "{") || !strings.Contains(string(log), "QEMU has ended") || strings.Contains(string(log), "starting") {
		t.Errorf("the log that goes on: %v\n%q", err, log)
	}

	// A shim that never gets ready is ended before libvirt hears of it, and not started again.
	h.dropIn("[Service]\nExecStart=\nExecStart=/bin/sleep 1000\n")
	out, err = h.Run("virsh", "start", name)
	if err == nil || !strings.Contains(out, "journalctl -u "+unit) {
		t.Errorf("a start that never ends: %v", err)
	}
	h.eventually("the unit's end", func() bool { return h.property("ActiveState") == "inactive" })
	h.nothingRuns()
}

// dropIn changes the template.
func (h *host) dropIn(text string) {
	h.t.Helper()
	dir := h.Path("/etc/systemd/system/ftclock-shim@.service.d")
	check.NoError(h.t, os.MkdirAll(dir, 0o755))
	check.NoError(h.t, os.WriteFile(dir+"/test.conf", []byte(text), 0o644))
	h.must("systemctl", "daemon-reload")
}
