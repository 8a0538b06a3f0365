package systemd

import (
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/container"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
)

// A guest that is reverted to an internal snapshot goes on where it would be without it, whichever way this libvirt has QEMU load it.
func TestKVMSnapshotRevert(t *testing.T) {
	const disk = "/var/lib/libvirt/images/web1.qcow2"
	h := boot(t, privatelibvirt.ClockWith(`<ftclock:on event="restore" do="catch-up"/>`), container.Options{})
	domaintest.Disk(t, h.Path(disk))
	h.must("virsh", "attach-disk", name, disk, "hda", "--targetbus", "ide", "--subdriver", "qcow2", "--config")
	h.must("virsh", "start", name)
	clock := h.clock()
	h.checkpoints(5)()
	before := domaintest.Offset(t, clock)
	h.must("ftclock", "anchor", "publish")
	h.must("virsh", "snapshot-create-as", name, "one")
	clock.Close()
	for range 2 {
		time.Sleep(300 * time.Millisecond)
		h.must("virsh", "snapshot-revert", name, "one")
		again := h.clock()
		drift := domaintest.Offset(t, again) - before
		again.Close()
		s := domaintest.StatusOf(t, h.Path(control.Dir), uuid)
		r := s.Records[0]
		t.Logf("%s: %s; %v lost, %d ns off", r.Decision, r.Reason, time.Duration(r.Lost), drift)
		if r.Event != clockpage.Restore || r.Decision != clockpage.Anchored || r.Reason != clockpage.FromImport {
			t.Errorf("record: %+v; warnings %q", r, s.Warnings)
		}
		check.Within(t, drift, 100_000, "the guest is off") // one write, not yet compared with anything
	}
	h.must("virsh", "destroy", name)
	h.nothingLeft()
}
