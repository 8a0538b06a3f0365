package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"

	"ftclock/control"
	"ftclock/host"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"
)

var (
	conn *libvirt.Connect
	elf  string // the kvmclock guest
)

// The whole of ftclock is installed in the private libvirt, as an operator would.
func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(privatelibvirt.WithGuest(&conn, &elf, m.Run), privatelibvirt.Installed("../..")))
}

const clockElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`

// patientElement is for pauses that something holds up: on a starved machine they get longer than a checkpoint may be by default, and
// would be held.
const patientElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="checkpoint" limit="10min"/></ftclock:clock>`

// managed is the guest's domain with metadata.
func managed(name, metadata string) *libvirtxml.Domain {
	x := privatelibvirt.GuestXML(name, elf)
	x.Metadata = &libvirtxml.DomainMetadata{XML: metadata}
	return x
}

// define defines a domain that goes with the test.
func define(t *testing.T, x *libvirtxml.Domain) *privatelibvirt.Domain {
	t.Helper()
	d, err := privatelibvirt.Define(conn, x)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(privatelibvirt.Log(d.Name))
			t.Log(shimLog(d.Name))
		}
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
		nothingLeft(t)
	})
	return d
}

// start defines and starts a domain, and waits until its guest's clock moves.
// Both go with the test.
func start(t *testing.T, x *libvirtxml.Domain) (*privatelibvirt.Domain, *guest.Clock) {
	t.Helper()
	d := define(t, x)
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	clock, err := d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { clock.Close() })
	return d, clock
}

// startWithMonitor starts a managed domain that has a second monitor, for an engine of its own.
func startWithMonitor(t *testing.T, name string) (*privatelibvirt.Domain, *guest.Clock, *qmp.Conn) {
	t.Helper()
	x := managed(name, clockElement)
	if _, err := privatelibvirt.AddMonitor(x); err != nil {
		t.Fatal(err)
	}
	d, clock := start(t, x)
	return d, clock, monitorOf(t, d)
}

// monitorOf connects to a domain's second monitor. The connection goes with the test.
func monitorOf(t *testing.T, d *privatelibvirt.Domain) *qmp.Conn {
	t.Helper()
	monitor, err := d.Monitor()
	if err != nil {
		t.Fatal(err)
	}
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

// status asks the domain's shim.
func status(t *testing.T, d *privatelibvirt.Domain) *control.Status {
	t.Helper()
	uuid, err := d.GetUUIDString()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := control.Ask(control.Dir, uuid, control.Request{Do: "status", Records: 256})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Status
}

// offset is the guest's offset against CLOCK_MONOTONIC_RAW in ns; it grows by what the guest loses.
func offset(t *testing.T, c *guest.Clock) int64 {
	t.Helper()
	o, err := c.SettledOffset()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// virsh runs virsh and gives what it prints, and whether it succeeded.
func virsh(args ...string) (string, error) {
	out, err := privatelibvirt.Virsh(args...)
	return fmt.Sprint(out), err
}
