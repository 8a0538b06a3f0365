package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// A tap interface comes to QEMU as a file descriptor over the monitor.
func TestKVMHotplugOfATapInterface(t *testing.T) {
	x := managed("tap", clockElement)
	x.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}} // PCI hot-plug is ACPI's
	d, _ := start(t, x)
	const nic = `<interface type='ethernet'><mac address='52:54:00:00:00:%02x'/><model type='e1000'/></interface>`
	for i := range 3 {
		if err := d.AttachDeviceFlags(fmt.Sprintf(nic, i), libvirt.DOMAIN_DEVICE_MODIFY_LIVE); err != nil {
			t.Fatal(err)
		}
	}
	pid, err := d.PID()
	if err != nil {
		t.Fatal(err)
	}
	taps := 0
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == "/dev/net/tun" {
			taps++
		}
	}
	if taps != 3 {
		t.Errorf("QEMU has %d taps, want 3", taps)
	}
	// None of them stayed in the shim.
	for _, shim := range shims() {
		fds, _ := filepath.Glob("/proc/" + shim + "/fd/*")
		for _, fd := range fds {
			if target, _ := os.Readlink(fd); target == "/dev/net/tun" {
				t.Errorf("shim %s kept a tap", shim)
			}
		}
	}
}

// virsh save sends the state through a descriptor that comes over the monitor, too. The time that the guest was away is
// held, and the checkpoints after it are caught up.
func TestKVMSaveAndRestore(t *testing.T) {
	d, clock := start(t, managed("saved", clockElement))
	dir, err := privatelibvirt.QEMUDir("save")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "saved.state")
	before := offset(t, clock)
	for range 20 {
		pause(t, d, 5*time.Millisecond)
	}
	clock.Close()
	if out, err := virsh("save", "saved", file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	nothingLeft(t)
	time.Sleep(time.Second)
	if out, err := virsh("restore", file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	clock, err = d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	defer clock.Close()
	pause(t, d, 5*time.Millisecond) // takes the new anchor
	restored := offset(t, clock)
	if away := restored - before; away < int64(time.Second) {
		t.Errorf("the guest's clock went on while it was saved: it is only %d ns behind", away)
	}
	for range 20 {
		pause(t, d, 5*time.Millisecond)
	}
	if drift := offset(t, clock) - restored; drift > maxDrift || drift < -maxDrift {
		t.Errorf("checkpoints after the restore drift by %d ns", drift)
	}
	if s := status(t, d); s.State != control.Correcting || s.Disagreements != 0 {
		t.Errorf("status: %+v", s)
	}
}

// A saved guest that is to be caught up goes on as if it had never been away, over a save file as over a managed save.
func TestKVMARestoreIsCaughtUp(t *testing.T) {
	const catchUp = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="restore" do="catch-up"%s/></ftclock:clock>`
	dir, err := privatelibvirt.QEMUDir("save")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "away.state")
	for _, c := range []struct {
		name, limit  string
		save, resume []string
		held         bool
	}{
		{"save", "", []string{"save", "away", file}, []string{"restore", file}, false},
		{"managed save", "", []string{"managedsave", "away"}, []string{"start", "away"}, false},
		{"past its limit", ` limit="500ms"`, []string{"save", "away", file}, []string{"restore", file}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("away", fmt.Sprintf(catchUp, c.limit)))
			pause(t, d, 5*time.Millisecond)
			before := offset(t, clock)
			clock.Close()
			if out, err := virsh(c.save...); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			nothingLeft(t)
			time.Sleep(2 * time.Second)
			if out, err := virsh(c.resume...); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if clock, err = d.Clock(); err != nil {
				t.Fatal(err)
			}
			defer clock.Close()
			for range 20 {
				pause(t, d, 5*time.Millisecond)
			}
			lost := offset(t, clock) - before
			s := status(t, d)
			for _, r := range s.Records[:1] {
				t.Logf("%s, %s: %s", r.Event, r.Decision, r.Reason)
			}
			// CLOCK_REALTIME, by which the time away is measured, is disciplined: up to 500 ppm off CLOCK_MONOTONIC_RAW,
			// and not known to be so to better than its reading.
			const bound = int64(2 * time.Millisecond)
			if !c.held && (lost > bound || lost < -bound) {
				t.Errorf("the guest lost %d ns while it was saved", lost)
			}
			if c.held && lost < int64(2*time.Second) {
				t.Errorf("the guest was away for longer than its limit, but lost only %d ns", lost)
			}
			if s.State != control.Correcting || s.Disagreements != 0 {
				t.Errorf("status: %+v", s)
			}
		})
	}
}

// A suspend, longer than the checkpoint's limit, is held, and the next checkpoint doesn't catch it up after all.
func TestKVMASuspendIsHeld(t *testing.T) {
	const short = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="checkpoint" limit="%s"/>%s</ftclock:clock>`
	for _, c := range []struct {
		name, suspend string
		held          bool
	}{
		{"hold", ``, true},
		{"catch-up", `<ftclock:on event="suspend" do="catch-up"/>`, false},
		{"catch-up within its limit", `<ftclock:on event="suspend" do="catch-up" limit="1m"/>`, false},
		{"catch-up past its limit", `<ftclock:on event="suspend" do="catch-up" limit="700ms"/>`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("suspended", fmt.Sprintf(short, "500ms", c.suspend)))
			pause(t, d, 5*time.Millisecond)
			before := offset(t, clock)
			pause(t, d, time.Second)
			pause(t, d, 5*time.Millisecond)
			lost := offset(t, clock) - before
			if c.held && lost < int64(time.Second)-maxDrift {
				t.Errorf("a pause of 1 s should have been held, but only %d ns were", lost)
			}
			if !c.held && (lost > maxDrift || lost < -maxDrift) {
				t.Errorf("a pause of 1 s should have been caught up: %d ns lost", lost)
			}
			if c.suspend != "" && c.held {
				if s := status(t, d); s.OverLimit != 1 || !strings.Contains(strings.Join(s.Warnings, " "), "longer than the limit") {
					t.Errorf("nothing is said of the limit: %+v", s)
				}
			}
		})
	}
}

// libvirtd finds its domains again through their shims.
func TestKVMLibvirtdRestarts(t *testing.T) {
	d, clock := start(t, managed("restarted", clockElement))
	before := offset(t, clock)
	for i := range 4 {
		pause(t, d, 5*time.Millisecond)
		stop := privatelibvirt.Stop
		if i%2 == 1 {
			stop = privatelibvirt.Kill
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if err := privatelibvirt.Start(); err != nil {
			t.Fatal(err)
		}
		var err error
		if conn, err = privatelibvirt.Connect(); err != nil {
			t.Fatal(err)
		}
		if d.Domain, err = conn.LookupDomainByName("restarted"); err != nil {
			t.Fatal(err)
		}
		if active, err := d.IsActive(); err != nil || !active {
			t.Fatalf("the domain is gone: %v", err)
		}
		pause(t, d, 5*time.Millisecond)
	}
	if drift := offset(t, clock) - before; drift > maxDrift || drift < -maxDrift {
		t.Errorf("drift of %d ns", drift)
	}
}

// The README's one-liner is enough.
func TestKVMVirshMetadataAloneEnables(t *testing.T) {
	d := define(t, privatelibvirt.GuestXML("oneliner", elf))
	if out, err := virsh("metadata", "oneliner", "urn:ftclock:domain:1", "--key", "ftclock", "--set", "<clock/>", "--config"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	clock, err := d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	defer clock.Close()
	pause(t, d, 5*time.Millisecond)
	if s := status(t, d); s.State != control.Correcting || s.Dropped+s.Anchored != 1 {
		t.Errorf("status: %+v", s)
	}
}

// Domains whose names are as long and odd as libvirt allows.
func TestKVMNames(t *testing.T) {
	for _, name := range []string{
		"a name with spaces, and longer than twenty characters",
		"Größe-漢字-漢字漢字漢字漢字漢字漢字",
		"-begins-with-a-dash",
		"quote\"s and 'such' & <so>",
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := start(t, managed(name, clockElement))
			pause(t, d, 5*time.Millisecond)
			if s := status(t, d); s.State != control.Correcting || s.Dropped+s.Anchored != 1 {
				t.Errorf("status: %+v", s)
			}
		})
	}
}

func pause(t *testing.T, d *privatelibvirt.Domain, length time.Duration) {
	t.Helper()
	if err := d.Suspend(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(length)
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
}
