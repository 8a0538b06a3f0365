package domaintest

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// BootTime bounds a guest's boot until its clock moves. Seconds are usual.
const BootTime = 2 * time.Minute

// Define defines a domain that is removed with the test.
func Define(t testing.TB, conn *libvirt.Connect, x *libvirtxml.Domain) *privatelibvirt.Domain {
	t.Helper()
	d := check.Value(privatelibvirt.Define(conn, x))(t)
	t.Cleanup(func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Start defines and starts a domain with the kvmclock guest, and waits until its clock moves. All of it goes with the test.
func Start(t testing.TB, conn *libvirt.Connect, x *libvirtxml.Domain) (*privatelibvirt.Domain, *guest.Clock) {
	t.Helper()
	d := Define(t, conn, x)
	return d, StartClock(t, d)
}

// StartClock starts a defined domain, and gives its guest's clock, which goes with the test.
func StartClock(t testing.TB, d *privatelibvirt.Domain) *guest.Clock {
	t.Helper()
	check.NoError(t, d.Create())
	return Clock(t, d)
}

// Clock is that of a running domain, whose QEMU may be a new one. It goes with the test.
func Clock(t testing.TB, d *privatelibvirt.Domain) *guest.Clock {
	t.Helper()
	clock := check.Value(d.Clock())(t)
	t.Cleanup(func() { _ = clock.Close() })
	return clock
}

// ClockOfProcess is that of the guest in a QEMU with that pid, as soon as it moves. It goes with the test.
func ClockOfProcess(t testing.TB, qemu int) *guest.Clock {
	t.Helper()
	clock := check.Value(guest.Open(qemu))(t)
	t.Cleanup(func() { _ = clock.Close() })
	check.NoError(t, clock.WaitMoving(BootTime))
	return clock
}

// Offset is how far the guest's clock is behind CLOCK_MONOTONIC_RAW, ns; it grows by what the guest loses.
func Offset(t testing.TB, clock *guest.Clock) int64 {
	t.Helper()
	return check.Value(clock.SettledOffset())(t)
}

// Kept checks that the guest's clock, whose offset was before, lost no more than it may since. It gives what it lost, ns.
func Kept(t testing.TB, clock *guest.Clock, before int64, format string, args ...any) int64 {
	t.Helper()
	drift := Offset(t, clock) - before
	check.Within(t, drift, guest.MaxDrift, format, args...)
	return drift
}

// NoBacksteps checks that the guest never saw its clock go back.
func NoBacksteps(t testing.TB, clock *guest.Clock) {
	t.Helper()
	if count, largest, err := clock.Backsteps(); err != nil || count != 0 {
		t.Errorf("the guest saw time go back %d times, by up to %d ns: %v", count, largest, err)
	}
}

// Pause suspends a domain for that long.
func Pause(t testing.TB, d *privatelibvirt.Domain, length time.Duration) {
	t.Helper()
	check.NoError(t, d.Pause(length))
}

// Pauses suspends a domain so many times, for that long each.
func Pauses(t testing.TB, d *privatelibvirt.Domain, times int, length time.Duration) {
	t.Helper()
	for range times {
		Pause(t, d, length)
	}
}

// AwaitState waits until libvirt shows the domain in that state.
func AwaitState(t testing.TB, d *privatelibvirt.Domain, want libvirt.DomainState) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		state, reason, err := d.GetState()
		if err == nil && state == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the domain is in state %d (%d), want %d: %v", state, reason, want, err)
		}
	}
}

// UUID is the domain's.
func UUID(t testing.TB, d *privatelibvirt.Domain) string {
	t.Helper()
	return check.Value(d.GetUUIDString())(t)
}

// PID is that of the domain's QEMU.
func PID(t testing.TB, d *privatelibvirt.Domain) int {
	t.Helper()
	return check.Value(d.PID())(t)
}

// Status is what the domain's shim says, with all of the records that it has.
func Status(t testing.TB, d *privatelibvirt.Domain) *control.Status {
	t.Helper()
	return StatusOf(t, control.Dir, UUID(t, d))
}

// StatusOf is what the shim of a UUID says on the host whose control.Dir is dir, with all of the records that it has.
func StatusOf(t testing.TB, dir, uuid string) *control.Status {
	t.Helper()
	return check.Value(control.Ask(dir, uuid, control.Request{Do: "status", Records: 256}))(t).Status
}

// File is a path of that name in a directory that QEMU's user may write to.
func File(t testing.TB, dir, name string) string {
	t.Helper()
	return filepath.Join(check.Value(privatelibvirt.QEMUDir(dir))(t), name)
}

// Lookup is a domain that libvirt has under that name, here or on another host. It is freed with the test.
func Lookup(t testing.TB, conn *libvirt.Connect, name string) *privatelibvirt.Domain {
	t.Helper()
	found := check.Value(conn.LookupDomainByName(name))(t)
	t.Cleanup(func() { _ = found.Free() })
	return &privatelibvirt.Domain{Domain: found, Name: name}
}

// Disk makes a disk that can hold snapshots, in a file for QEMU, and gives its path.
func Disk(t testing.TB, path string) string {
	t.Helper()
	check.Output(t, exec.Command("qemu-img", "create", "-f", "qcow2", path, "4M"))
	return path
}
