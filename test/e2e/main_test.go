package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/host"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

var (
	conn *libvirt.Connect
	elf  string // the kvmclock guest
)

// The whole of ftclock is installed in the private libvirt, as an operator would.
func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(privatelibvirt.WithGuest(&conn, &elf, m.Run), privatelibvirt.Installed("../..")))
}

const (
	maxDrift       = guest.MaxDrift
	clockElement   = privatelibvirt.ClockElement
	patientElement = privatelibvirt.PatientElement
)

// Short names of what nearly every test here does, and maxWritten, what a guest's clock may be off by after it was written, ns.
var (
	pause, pauses, offset = domaintest.Pause, domaintest.Pauses, domaintest.Offset
	status, awaitState    = domaintest.Status, domaintest.AwaitState
	virsh                 = privatelibvirt.Virsh
	clockWith, saveFile   = privatelibvirt.ClockWith, func(t *testing.T, name string) string { return domaintest.File(t, "save", name) }
	maxWritten            = kvmhost.Stretched(maxDrift)
)

// managed is the guest's domain with that metadata; "" is none.
func managed(name, metadata string) *libvirtxml.Domain {
	return privatelibvirt.Manage(privatelibvirt.GuestXML(name, elf), metadata)
}

// define defines a domain that goes with the test.
func define(t *testing.T, x *libvirtxml.Domain) *privatelibvirt.Domain {
	t.Helper()
	t.Cleanup(func() { nothingLeft(t) })
	d := domaintest.Define(t, conn, x)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(privatelibvirt.Log(d.Name))
			t.Log(shimLog(d.Name))
		}
	})
	return d
}

// start defines and starts a domain, and waits until its guest's clock moves.
// Both go with the test.
func start(t *testing.T, x *libvirtxml.Domain) (*privatelibvirt.Domain, *guest.Clock) {
	t.Helper()
	d := define(t, x)
	return d, domaintest.StartClock(t, d)
}

// startWithMonitor starts a managed domain that has a second monitor, for an engine of its own.
func startWithMonitor(t *testing.T, name string) (*privatelibvirt.Domain, *guest.Clock, *qmp.Conn) {
	t.Helper()
	x := managed(name, clockElement)
	check.Value(privatelibvirt.AddMonitor(x))(t)
	d, clock := start(t, x)
	return d, clock, monitorOf(t, d)
}

// monitorOf connects to a domain's second monitor. The connection goes with the test.
func monitorOf(t *testing.T, d *privatelibvirt.Domain) *qmp.Conn {
	t.Helper()
	monitor := check.Value(d.Monitor())(t)
	t.Cleanup(func() { monitor.Close() })
	return monitor
}

func shimLog(name string) string {
	text, err := os.ReadFile(filepath.Join(host.LogDir, name+".log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// shims are the pids of the shims that run in here.
func shims() (pids []string) {
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if target, err := os.Readlink(exe); err == nil && strings.HasPrefix(filepath.Base(target), "ftclock-shim") {
			pids = append(pids, strings.Split(exe, "/")[2])
		}
	}
	return pids
}

// nothingLeft checks that no domain's end or failed start left anything of ftclock's behind.
func nothingLeft(t *testing.T) {
	t.Helper()
	// A shim ends after its QEMU; libvirt doesn't wait for it everywhere.
	for deadline := time.Now().Add(2 * time.Minute); len(shims()) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	if left := shims(); len(left) > 0 {
		t.Errorf("shims still run: %v", left)
	}
	if left, _ := filepath.Glob(control.Dir + "/*"); len(left) > 0 {
		t.Errorf("state left behind: %v", left)
	}
	if left, _ := filepath.Glob("/var/lib/libvirt/qemu/domain-*"); len(left) > 0 {
		t.Errorf("directories left behind: %v", left)
	}
}

// ended ends a domain, and checks that nothing is left of it.
func ended(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	check.NoError(t, d.Destroy())
	nothingLeft(t)
}

// ftclockCommand is the installed command line.
func ftclockCommand(args ...string) *exec.Cmd {
	return exec.Command(privatelibvirt.Prefix+"/bin/ftclock", args...)
}
