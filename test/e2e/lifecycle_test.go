package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// A tap interface comes to QEMU as a file descriptor over the monitor.
func TestKVMHotplugOfATapInterface(t *testing.T) {
	x := managed("tap", clockElement)
	privatelibvirt.ACPI(x) // PCI hot-plug is ACPI's
	d, _ := start(t, x)
	const nic = `<interface type='ethernet'><mac address='52:54:00:00:00:%02x'/><model type='e1000'/></interface>`
	for i := range 3 {
		check.NoError(t, d.AttachDeviceFlags(fmt.Sprintf(nic, i), libvirt.DOMAIN_DEVICE_MODIFY_LIVE))
	}
	pid := domaintest.PID(t, d)
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
	file := saveFile(t, "saved.state")
	before := offset(t, clock)
	pauses(t, d, 20, 5*time.Millisecond)
	clock.Close()
	mustVirsh(t, "save", "saved", file)
	nothingLeft(t)
	time.Sleep(time.Second)
	mustVirsh(t, "restore", file)
	clock = domaintest.Clock(t, d)
	pause(t, d, 5*time.Millisecond) // takes the new anchor
	restored := offset(t, clock)
	if away := restored - before; away < int64(time.Second) {
		t.Errorf("the guest's clock went on while it was saved: it is only %d ns behind", away)
	}
	pauses(t, d, 20, 5*time.Millisecond)
	check.Within(t, offset(t, clock)-restored, maxDrift, "checkpoints after the restore drift")
	s := status(t, d)
	if s.State != control.Correcting || s.Disagreements != 0 {
		t.Errorf("status: %+v", s)
	}
	checkRestored(t, s.Records[0], "default", clockpage.FromImport)
}

// A saved guest that is to be caught up goes on as if it had never been away, over a save file as over a managed save. On one host
// CLOCK_MONOTONIC_RAW carries the clock on.
func TestKVMARestoreIsCaughtUp(t *testing.T) {
	file := saveFile(t, "away.state")
	ways := map[string][2][]string{
		"save":         {{"save", "away", file}, {"restore", file}},
		"managed save": {{"managedsave", "away"}, {"start", "away"}},
	}
	const away = 2 * time.Second
	for _, c := range []struct {
		way, rule, clock string
	}{
		{"save", restoreRules[1].name, restoreRules[1].clock},
		{"save", restoreRules[2].name, restoreRules[2].clock},
		{"managed save", restoreRules[0].name, restoreRules[0].clock},
		{"managed save", restoreRules[1].name, restoreRules[1].clock},
	} {
		t.Run(c.way+", "+c.rule, func(t *testing.T) {
			d, clock := start(t, managed("away", c.clock))
			pause(t, d, 5*time.Millisecond)
			before := offset(t, clock)
			clock.Close()
			mustVirsh(t, ways[c.way][0]...)
			nothingLeft(t)
			time.Sleep(away)
			mustVirsh(t, ways[c.way][1]...)
			clock = domaintest.Clock(t, d)
			pauses(t, d, 20, 5*time.Millisecond)
			s := status(t, d)
			checkRestored(t, s.Records[0], c.rule, clockpage.FromImport)
			lost := lostAsRecorded(t, clock, before, s.Records[:1])
			t.Logf("the guest lost %d ns: %s, %s", lost, s.Records[0].Decision, s.Records[0].Reason)
			if held := lost >= int64(away); held == (c.rule == "catch-up") {
				t.Errorf("the guest was away for %v or more, and lost %d ns", away, lost)
			}
			if s.State != control.Correcting || s.Disagreements != 0 {
				t.Errorf("status: %+v", withoutRecords(s))
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// A suspend, longer than the checkpoint's limit, is held, and the next checkpoint doesn't catch it up after all.
func TestKVMASuspendIsHeld(t *testing.T) {
	const short = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="checkpoint" limit="%s"/>%s</ftclock:clock>`
	// The limits are such that no short pause is over them, however long a busy machine makes it.
	const long = 5 * time.Second
	d, clock := start(t, managed("suspended", clockElement))
	for _, c := range []struct {
		name, suspend string
		held          bool
	}{
		{"hold", ``, true},
		{"catch-up", `<ftclock:on event="suspend" do="catch-up"/>`, false},
		{"catch-up within its limit", `<ftclock:on event="suspend" do="catch-up" limit="1m"/>`, false},
		{"catch-up past its limit", `<ftclock:on event="suspend" do="catch-up" limit="4s"/>`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			setPolicy(t, d, fmt.Sprintf(short, "3s", c.suspend))
			pause(t, d, 5*time.Millisecond)
			before, overLimit := offset(t, clock), status(t, d).OverLimit
			pause(t, d, long)
			pause(t, d, 5*time.Millisecond)
			lost := offset(t, clock) - before
			if c.held && lost < int64(long)-maxDrift {
				t.Errorf("a pause of %v should have been held, but only %d ns were", long, lost)
			}
			if !c.held && guest.Off(lost) {
				t.Errorf("a pause of %v should have been caught up: %d ns lost", long, lost)
			}
			if c.suspend != "" && c.held {
				if s := status(t, d); s.OverLimit != overLimit+1 || !strings.Contains(strings.Join(s.Warnings, " "), "longer than the limit") {
					t.Errorf("nothing is said of the limit: %+v", s)
				}
			}
		})
	}
	t.Run("the default limit", func(t *testing.T) {
		setPolicy(t, d, clockElement)
		pause(t, d, 5*time.Millisecond) // takes the anchor
		for _, c := range []struct {
			length   time.Duration
			caughtUp bool
			event    clockpage.Event
		}{
			{8 * time.Second, true, clockpage.Checkpoint},
			{10*time.Second + 20*time.Millisecond, false, clockpage.Suspend},
		} {
			underRule(t, d, clock, rule{"", clockElement, c.caughtUp, c.event, clockpage.ByThePolicy}, true, func(t *testing.T) { pause(t, d, c.length) })
		}
	})
}

// Libvirt renames a domain that is off, and keeps its UUID: its record goes on, and a state that it saved before is caught up. A clone
// has another UUID, and nothing of either, though its metadata and its disk are the same.
func TestKVMARenamedDomainAndAClone(t *testing.T) {
	x := withSnapshots(t, "named", restoreRules[1].clock)
	d, clock := start(t, x)
	uuid := domaintest.UUID(t, d)
	pause(t, d, 5*time.Millisecond)
	before := offset(t, clock)
	clock.Close()
	check.NoError(t, d.Suspend())
	human(t, d, "savevm one")
	ended(t, d)
	disk := x.Devices.Disks[0].Source.File.File
	check.Output(t, exec.Command("cp", disk, disk+"-clone"))

	// QEMU is told to load the state: libvirt renames no domain that has one by its own books.
	mustVirsh(t, "domrename", "named", "renamed")
	d.Name, x.Name, x.UUID = "renamed", "renamed", uuid
	privatelibvirt.AddArguments(x, "-loadvm", "one")
	check.Value(privatelibvirt.Define(conn, x))(t)
	check.NoError(t, d.Create())
	clock = domaintest.Clock(t, d)
	r := restored(t, d, clock)
	checkRestored(t, r, "catch-up", clockpage.FromImport)
	lostAsRecorded(t, clock, before, nil)
	clock.Close()
	if all, pauses := kept(t, d); all.Name != "renamed" || len(pauses) != 2+6 || pauses[0].Run == pauses[7].Run {
		t.Errorf("the record is of %s and has %d pauses, want 2 of the first run and 6 of the second: %+v", all.Name, len(pauses), pauses)
	}
	ended(t, d)

	x.Name, x.UUID, x.Devices.Disks[0].Source.File.File = "cloned", "", disk+"-clone"
	clone, clock := start(t, x)
	r = restored(t, clone, clock)
	checkRestored(t, r, "default", 0)
	if s := status(t, clone); s.Pauses != 6 || !strings.Contains(strings.Join(s.Warnings, "; "), "nothing is known of its stop") {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	if all, pauses := kept(t, clone); all.Name != "cloned" || len(pauses) != 6 {
		t.Errorf("the clone's record is of %s and has %d pauses, want 6", all.Name, len(pauses))
	}
	if all, pauses := kept(t, d); all.Name != "renamed" || len(pauses) != 2+6 {
		t.Errorf("with a clone, the record is of %s and has %d pauses, want 8", all.Name, len(pauses))
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
		check.NoError(t, stop())
		check.NoError(t, privatelibvirt.Start())
		reconnect(t, d)
		if active, err := d.IsActive(); err != nil || !active {
			t.Fatalf("the domain is gone: %v", err)
		}
		pause(t, d, 5*time.Millisecond)
	}
	check.Within(t, offset(t, clock)-before, maxDrift, "drift")
}

// The README's one-liner is enough.
func TestKVMVirshMetadataAloneEnables(t *testing.T) {
	d := define(t, privatelibvirt.GuestXML("oneliner", elf))
	mustVirsh(t, "metadata", "oneliner", "urn:ftclock:domain:1", "--key", "ftclock", "--set", "<clock/>", "--config")
	_ = domaintest.StartClock(t, d)
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

// The metadata of a running domain is changed by anybody's virsh, and takes effect at the next pause. What is switched off
// leaves the guest's clock where it is.
func TestKVMMetadataChangedLive(t *testing.T) {
	d, clock := start(t, managed("live", clockElement))
	set := func(args ...string) {
		t.Helper()
		mustVirsh(t, append([]string{"metadata", "live", "urn:ftclock:domain:1", "--live"}, args...)...)
	}
	const length = 100 * time.Millisecond
	before := offset(t, clock)
	lost := func() int64 {
		t.Helper()
		o := offset(t, clock)
		defer func() { before = o }()
		return o - before
	}
	pause(t, d, length)
	check.Within(t, lost(), maxDrift, "enabled: it lost")
	// The pause is longer than the new limit: a suspend, which is held.
	set("--key", "ftclock", "--set", `<clock><on event="checkpoint" limit="10ms"/></clock>`)
	pause(t, d, length)
	if n := lost(); n < int64(length) {
		t.Errorf("with a limit of 10 ms it lost only %d ns of a pause of 100 ms", n)
	}
	set("--remove")
	check.Within(t, lost(), maxDrift, "switching off moved the clock")
	pause(t, d, length)
	if n := lost(); n < int64(length) {
		t.Errorf("switched off, it lost only %d ns of a pause of 100 ms", n)
	}
	if s := status(t, d); s.State != control.Watching {
		t.Errorf("status: %s", s.State)
	}
	set("--key", "ftclock", "--set", `<clock/>`)
	pause(t, d, length)
	check.Within(t, lost(), maxDrift, "enabled again: it lost")
	// What can't be understood changes nothing, and is said.
	set("--key", "ftclock", "--set", `<clock><on event="lunch"/></clock>`)
	pause(t, d, length)
	check.Within(t, lost(), maxDrift, "with a wrong element: it lost")
	s := status(t, d)
	if s.State != control.Correcting || !strings.Contains(strings.Join(s.Warnings, " "), `unknown value "lunch"`) {
		t.Errorf("status: %s, warnings %q", s.State, s.Warnings)
	}
	domaintest.NoBacksteps(t, clock)
}

// A guest that suspends itself to memory isn't paused: nothing is recorded of it, nor of a stop and a cont meanwhile where QEMU takes
// them for none (before 9.0). Its kvmclock goes on, and after it wakes up pauses are caught up as before.
func TestKVMAGuestSuspendsItself(t *testing.T) {
	image := linuxImage(t)
	x := linuxguest.XML("pmsuspended", image, 1)
	x.OS.Cmdline += " ftclock_sleep=30"
	x.PM = &libvirtxml.DomainPM{SuspendToMem: &libvirtxml.DomainPMPolicy{Enabled: "yes"}}
	privatelibvirt.Manage(x, clockElement)
	check.Value(privatelibvirt.AddMonitor(x))(t)
	d, clocks := boot(t, x)
	monitor := monitorOf(t, d)
	pause(t, d, 5*time.Millisecond)
	before := status(t, d).Pauses
	awaitState(t, d, libvirt.DOMAIN_PMSUSPENDED)
	for _, command := range []string{"stop", "cont"} {
		check.Value(monitor.Execute(command, nil))(t)
		time.Sleep(100 * time.Millisecond)
	}
	asleep := status(t, d)
	t.Logf("asleep: %d pauses, %d before; %+v", asleep.Pauses, before, asleep.Records)
	for _, r := range asleep.Records[before:] {
		if r.Decision != clockpage.Dropped {
			t.Errorf("while it slept: %+v", r)
		}
	}
	mustVirsh(t, "dompmwakeup", d.Name)
	awaitState(t, d, libvirt.DOMAIN_RUNNING)
	check.NoError(t, clocks.Monotonic.WaitMoving(2*time.Minute))
	at := offset(t, clocks.Monotonic)
	pauses(t, d, 5, 5*time.Millisecond)
	lost := offset(t, clocks.Monotonic) - at
	s := status(t, d)
	t.Logf("awake: it lost %d ns in 5 pauses; %+v", lost, s.Records[asleep.Pauses:])
	check.Within(t, lost, maxDrift, "after it woke up it lost in 5 pauses")
	if s.Disagreements != 0 || s.Reanchored != 0 || s.State != control.Correcting {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	for _, r := range s.Records[before:] {
		if r.Decision != clockpage.Dropped {
			t.Errorf("a pause: %+v", r)
		}
	}
	domaintest.NoBacksteps(t, clocks.Monotonic)
}
