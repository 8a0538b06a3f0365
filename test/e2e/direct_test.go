package e2e

import (
	"bufio"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/record"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
)

// directClock leaves the monitor alone, and has restores caught up.
const directClock = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" monitor="direct"><ftclock:on event="restore" do="catch-up"/></ftclock:clock>`

// socketsOf are the unix sockets among a process's descriptors.
func socketsOf(pid string) (all []string) {
	fds, _ := filepath.Glob("/proc/" + pid + "/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "socket:") {
			all = append(all, target)
		}
	}
	return all
}

// leftAlone checks that the only domain's monitor is QEMU's own socket, and that nothing of ftclock's holds an end of it.
func leftAlone(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	sockets, _ := filepath.Glob("/var/lib/libvirt/qemu/domain-*/monitor.*")
	if len(sockets) != 1 || filepath.Base(sockets[0]) != control.MonitorSocket {
		t.Fatalf("sockets: %v", sockets)
	}
	f := check.Value(os.Open("/proc/net/unix"))(t)
	defer f.Close()
	var monitor []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// Num RefCount Protocol Flags Type St Inode Path
		if fields := strings.Fields(lines.Text()); len(fields) >= 8 && strings.HasSuffix(lines.Text(), " "+sockets[0]) {
			monitor = append(monitor, "socket:["+fields[6]+"]")
		}
	}
	held := func(pid string) (n int) {
		for _, socket := range socketsOf(pid) {
			if slices.Contains(monitor, socket) {
				n++
			}
		}
		return n
	}
	qemu := domaintest.PID(t, d)
	if n := held(strconv.Itoa(qemu)); n < 2 { // it listens, and libvirt has connected
		t.Errorf("QEMU holds %d of %v", n, monitor)
	}
	for _, shim := range shims() {
		if n := held(shim); n > 0 {
			t.Errorf("shim %s holds %d of %v", shim, n, monitor)
		}
	}
}

// killed kills all shims, each pair at once.
func killed(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(time.Minute); len(shims()) > 0; {
		if time.Now().After(end) {
			t.Fatalf("shims still run: %v", shims())
		}
		for _, shim := range shims() {
			pid, _ := strconv.Atoi(shim)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// A domain whose metadata wants nothing on its monitor has its clock kept all the same, by the module's standing policy.
func TestKVMAMonitorLeftDirect(t *testing.T) {
	const name = "direct"
	dir := check.Value(privatelibvirt.QEMUDir("save"))(t)
	d, clock := start(t, managed(name, directClock))
	uuid := domaintest.UUID(t, d)
	leftAlone(t, d)
	if len(shims()) != 2 {
		t.Errorf("shims: %v", shims())
	}
	if wrong := checkpoints(t, clock, d.Suspend, d.Resume); wrong != "" {
		t.Error(wrong)
	}
	s := status(t, d)
	wellKept(t, s, "ptrace")
	if s.Mode != control.Watch || s.Orders != 0 || slices.ContainsFunc(s.Records, func(r clockpage.Record) bool { return r.Ordered == 1 }) {
		t.Errorf("it was ordered: %+v", withoutRecords(s))
	}
	says(t, 0, "whose monitor is left alone", "status", name)
	says(t, 0, "kvmclock holds", "verify", name)
	check.Await(t, time.Minute, 10*time.Millisecond, func() bool { return record.Managed(host.DataDir, uuid) }, "nothing says that it is managed")

	// What is asked for by now is for the next start.
	mustVirsh(t, "metadata", name, "urn:ftclock:domain:1", "--live", "--key", "ftclock", "--set", `<clock><on event="restore" do="catch-up"/></clock>`)
	says(t, 0, "a next start puts a relay between them", "status", name)
	mustVirsh(t, "metadata", name, "urn:ftclock:domain:1", "--live", "--key", "ftclock", "--set",
		`<clock monitor="direct"><on event="restore" do="catch-up"/></clock>`)
	says(t, 0, "whose monitor is left alone", "status", name)

	// libvirtd goes and comes.
	check.NoError(t, errors.Join(privatelibvirt.Kill(), privatelibvirt.Start()))
	reconnect(t, d)
	leftAlone(t, d)
	holds(t, d, clock, 20)

	// A saved state is caught up.
	file := filepath.Join(dir, "direct.state")
	pause(t, d, 5*time.Millisecond)
	before := offset(t, clock)
	clock.Close()
	mustVirsh(t, "save", name, file)
	nothingLeft(t)
	time.Sleep(rulePause)
	mustVirsh(t, "restore", file)
	clock = domaintest.Clock(t, d)
	checkRestored(t, restored(t, d, clock), "catch-up", clockpage.FromImport)
	carriedOn(t, clock, before, "catch-up")
	leftAlone(t, d)

	// There is nothing to kill that the domain or its clock would miss.
	killed(t)
	holds(t, d, clock, 50)
	says(t, 1, "the module in QEMU follows the last policy", "status", name)
	ftclock(t, "enable", name, "--live")
	holds(t, d, clock, 20)
	if s := status(t, d); s.State != control.Correcting || s.Mode != control.Watch {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	domaintest.NoBacksteps(t, clock)
	killed(t)
	ended(t, d)
}

// An internal snapshot is loaded before the shim is there, and the guest goes on after that.
func TestKVMASnapshotWithADirectMonitor(t *testing.T) {
	d, clock := start(t, withSnapshots(t, "direct", directClock))
	pause(t, d, 5*time.Millisecond)
	before := offset(t, clock)
	ftclock(t, "anchor", "publish")
	mustVirsh(t, "snapshot-create-as", "direct", "one")
	clock.Close()
	time.Sleep(rulePause)
	mustVirsh(t, "snapshot-revert", "direct", "one")
	clock = domaintest.Clock(t, d)
	checkRestored(t, restored(t, d, clock), "catch-up", clockpage.FromImport)
	carriedOn(t, clock, before, "catch-up")
	leftAlone(t, d)
}

// By the time that the hook knows, QEMU runs: libvirt ends it where the metadata requires ftclock.
func TestKVMADirectDomainThatCannotBeServed(t *testing.T) {
	replaced(t, installedModule, strings.Repeat("no ELF at all\n", 100), 0o644)
	const want = "invalid ELF header"
	t.Run("required", func(t *testing.T) {
		define(t, managed("required", directClock))
		failsToStart(t, "required", want)
	})
	t.Run("not required", func(t *testing.T) {
		d, _ := start(t, managed("optional", strings.Replace(directClock, ` monitor`, ` required="no" monitor`, 1)))
		pause(t, d, 5*time.Millisecond)
		leftAlone(t, d)
		if log := shimLog("optional"); !strings.Contains(log, `"level":"warn"`) || !strings.Contains(log, "starting uncorrected: ") || !strings.Contains(log, want) {
			t.Errorf("no warning in the log:\n%s", log)
		}
		says(t, 1, "QEMU has no module and the clock isn't corrected", "status", "optional")
		awaitState(t, d, libvirt.DOMAIN_RUNNING)
	})
}
