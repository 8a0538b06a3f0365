package systemd

import (
	"os/exec"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/container"
)

// A guest that is reverted to an internal snapshot goes on where it would be without it, whichever way this libvirt has QEMU load it.
func TestKVMSnapshotRevert(t *testing.T) {
	const rule = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="restore" do="catch-up"/></ftclock:clock>`
	const disk = "/var/lib/libvirt/images/web1.qcow2"
	h := boot(t, rule, container.Options{})
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", h.Path(disk), "4M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	h.must("virsh", "attach-disk", name, disk, "hda", "--targetbus", "ide", "--subdriver", "qcow2", "--config")
	h.must("virsh", "start", name)
	clock := h.clock()
	h.checkpoints(5)()
	before := h.offset(clock)
	h.must("ftclock", "anchor", "publish")
	h.must("virsh", "snapshot-create-as", name, "one")
	clock.Close()
	for range 2 {
		time.Sleep(300 * time.Millisecond)
		h.must("virsh", "snapshot-revert", name, "one")
		again := h.clock()
		drift := h.offset(again) - before
		again.Close()
		answer, err := control.Ask(h.Path(control.Dir), uuid, control.Request{Do: "status", Records: 256})
		if err != nil {
			t.Fatal(err)
		}
		r := answer.Status.Records[0]
		t.Logf("%s: %s; %v lost, %d ns off", r.Decision, r.Reason, time.Duration(r.Lost), drift)
		if r.Event != clockpage.Restore.String() || r.Decision != clockpage.Anchored.String() || r.Reason != clockpage.FromImport.String() {
			t.Errorf("record: %+v; warnings %q", r, answer.Status.Warnings)
		}
		if drift < -100_000 || drift > 100_000 { // one write, not yet compared with anything
			t.Errorf("the guest is %d ns off", drift)
		}
	}
	h.must("virsh", "destroy", name)
	h.nothingLeft()
}
