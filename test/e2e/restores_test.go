package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"
	metadata "ftclock/xml-templates"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// restoreRules are what the metadata can say of a loaded state.
var restoreRules = []struct{ name, clock string }{
	{"default", clockElement},
	{"catch-up", clockWith(`<ftclock:on event="restore" do="catch-up"/>`)},
	{"past its limit", clockWith(`<ftclock:on event="restore" do="catch-up" limit="200ms"/>`)},
}

// asRecorded checks that the guest's clock went on from the record's value at the record's time, and wasn't moved since.
func asRecorded(t *testing.T, clock *guest.Clock, r clockpage.Record) {
	t.Helper()
	least := int64(r.ContRaw) - int64(r.WentOn) - maxWritten
	most := least + int64(r.Cost) + 2*maxWritten
	o := offset(t, clock)
	if o < least || o > most {
		t.Errorf("the guest's offset is %d ns, by the record it should be %d to %d", o, least, most)
	}
}

// restored gives the record of the state that was loaded last, after some checkpoints that change nothing about it.
func restored(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock) clockpage.Record {
	t.Helper()
	pauses(t, d, 5, 5*time.Millisecond)
	s := status(t, d)
	if s.State != control.Correcting || s.Disagreements != 0 || s.Reanchored != 0 || s.Anchor.Valid != 1 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
	r := s.Records[len(s.Records)-6]
	t.Logf("%s, %s: %s; %v lost", r.Event, r.Decision, r.Reason, time.Duration(r.Lost))
	if r.Event != clockpage.Restore && r.Reason != clockpage.First {
		t.Errorf("a loaded state is taken for something else: %+v", r)
	}
	asRecorded(t, clock, r)
	domaintest.NoBacksteps(t, clock)
	return r
}

// checkRestored checks what was done with a state that was loaded under the rule of that name.
func checkRestored(t *testing.T, r clockpage.Record, rule string, how clockpage.Reason) {
	t.Helper()
	switch rule {
	case "catch-up":
		if r.Decision != clockpage.Anchored || r.Reason != how || r.WentOn < r.Saved+uint64(rulePause) {
			t.Errorf("record: %+v", r)
		}
	case "past its limit":
		if r.Decision != clockpage.Held || r.Reason != clockpage.OverLimit || r.WentOn != r.Saved {
			t.Errorf("record: %+v", r)
		}
	default: // held if something is known of its stop, and else passed
		held := r.Decision == clockpage.Held && r.Reason == clockpage.ByThePolicy
		if !held && (how == clockpage.FromImport || r.Decision != clockpage.Passed) || r.WentOn != r.Saved {
			t.Errorf("record: %+v", r)
		}
	}
}

// carriedOn checks that a guest whose rule is to be caught up has the time that it would have had without all that happened since
// its offset was before.
func carriedOn(t *testing.T, clock *guest.Clock, before int64, rule string) {
	t.Helper()
	lost := offset(t, clock) - before
	if rule == "catch-up" && (lost > maxFailover || lost < -maxFailover) {
		t.Errorf("the guest lost %d ns since before its state was saved", lost)
	} else if rule != "catch-up" && lost < int64(rulePause) {
		t.Errorf("the guest lost %v, and should have been held", time.Duration(lost))
	}
}

// mustVirsh runs virsh, which must succeed.
func mustVirsh(t *testing.T, args ...string) {
	t.Helper()
	check.Value(virsh(args...))(t)
}

// withSnapshots is a domain whose disk holds snapshots.
func withSnapshots(t *testing.T, name, clock string) *libvirtxml.Domain {
	t.Helper()
	disk := domaintest.Disk(t, domaintest.File(t, "snapshots", name))
	x := managed(name, clock)
	x.Devices.Disks = []libvirtxml.DomainDisk{privatelibvirt.QCOW2(disk)}
	return x
}

// A state that is loaded into the QEMU that saved it.
func TestKVMALoadedState(t *testing.T) {
	d, clock := start(t, withSnapshots(t, "loaded", clockElement))
	pause(t, d, 5*time.Millisecond) // takes the anchor
	for _, c := range restoreRules {
		t.Run(c.name, func(t *testing.T) {
			setPolicy(t, d, c.clock)
			before := offset(t, clock)
			human(t, d, "savevm one")
			lostAsRecorded(t, clock, before, nil) // a pause like any other
			time.Sleep(rulePause)
			human(t, d, "loadvm one")
			r := restored(t, d, clock)
			checkRestored(t, r, c.name, clockpage.FromAnchor)
			lost := offset(t, clock) - before
			if caughtUp := lost < int64(rulePause); caughtUp != (c.name == "catch-up") {
				t.Errorf("the guest lost %v since the state was saved", time.Duration(lost))
			}
			if c.name == "catch-up" {
				lostAsRecorded(t, clock, before, nil)
			}
		})
	}
}

// libvirt's internal snapshots. It reverts to one by a new QEMU.
func TestKVMInternalSnapshots(t *testing.T) {
	for _, c := range restoreRules[:2] {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, withSnapshots(t, "snapshots", c.clock))
			pause(t, d, 5*time.Millisecond)
			before := offset(t, clock)
			if c.name == "catch-up" {
				ftclock(t, "anchor", "publish") // as the timer does: the snapshot's metadata has it then
			}
			mustVirsh(t, "snapshot-create-as", "snapshots", "one")
			lostAsRecorded(t, clock, before, nil)
			clock.Close()
			time.Sleep(rulePause)

			// While it runs, and while it is shut off. What its clock read before the snapshot was made is in its metadata.
			mustVirsh(t, "snapshot-revert", "snapshots", "one")
			clock = domaintest.Clock(t, d)
			running := restored(t, d, clock)
			carriedOn(t, clock, before, c.name)
			clock.Close()
			ended(t, d)
			mustVirsh(t, "snapshot-revert", "snapshots", "one", "--running")
			clock = domaintest.Clock(t, d)
			off := restored(t, d, clock)
			carriedOn(t, clock, before, c.name)
			clock.Close()
			if running.Saved != off.Saved {
				t.Errorf("one snapshot, two clocks: %d and %d ns", running.Saved, off.Saved)
			}
			how := clockpage.FromImport
			if c.name == "default" {
				how = 0 // no anchor was published
			}
			checkRestored(t, running, c.name, how)
			checkRestored(t, off, c.name, how)

			// One with which the domain ended.
			mustVirsh(t, "snapshot-create-as", "snapshots", "two", "--halt")
			nothingLeft(t)
			time.Sleep(rulePause)
			mustVirsh(t, "snapshot-revert", "snapshots", "two", "--running")
			clock = domaintest.Clock(t, d)
			checkRestored(t, restored(t, d, clock), c.name, how)
		})
	}
}

// libvirt 10.10 and later start a QEMU like any other for it, and have it load the snapshot by a command on the monitor
// before its first cont. Here that is done by hand, to the QEMU of an older libvirt; test/systemd has newer libvirts do it.
func TestKVMASnapshotLoadedOverTheMonitor(t *testing.T) {
	const name, node = "monitored", "libvirt-1-format"
	for _, c := range restoreRules[:2] {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, withSnapshots(t, name, c.clock))
			pause(t, d, 5*time.Millisecond)
			before := offset(t, clock)
			ftclock(t, "anchor", "publish")
			anchor := check.Value(virsh("metadata", name, metadata.AnchorNamespace))(t)
			human(t, d, "savevm one")
			lostAsRecorded(t, clock, before, nil)
			clock.Close()
			ended(t, d)
			time.Sleep(rulePause)

			mustVirsh(t, "metadata", name, metadata.AnchorNamespace, "--config", "--key", "ftclock", "--set", strings.TrimSpace(anchor))
			mustVirsh(t, "start", name, "--paused")
			mustVirsh(t, "qemu-monitor-command", name, `{"execute":"snapshot-load","arguments":{"job-id":"load","tag":"one","vmstate":"`+
				node+`","devices":["`+node+`"]}}`)
			for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
				jobs, err := virsh("qemu-monitor-command", name, `{"execute":"query-jobs"}`)
				if err == nil && strings.Contains(jobs, `"concluded"`) && !strings.Contains(jobs, `"error"`) {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("the snapshot isn't loaded: %v\n%s", err, jobs)
				}
			}
			mustVirsh(t, "resume", name)
			clock = domaintest.Clock(t, d)
			checkRestored(t, restored(t, d, clock), c.name, clockpage.FromImport)
			carriedOn(t, clock, before, c.name)
		})
	}
}

// External snapshots of the memory. libvirt 9.0 doesn't revert to them itself, but restores their file as a saved state.
func TestKVMExternalMemorySnapshots(t *testing.T) {
	file := domaintest.File(t, "snapshots", "memory")
	for _, c := range restoreRules[:2] {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("external", c.clock))
			pause(t, d, 5*time.Millisecond)
			if c.name == "catch-up" {
				ftclock(t, "anchor", "publish")
			}
			first := offset(t, clock)
			for _, options := range [][]string{nil, {"--live"}} {
				before, s0 := offset(t, clock), status(t, d)
				mustVirsh(t, append([]string{"snapshot-create-as", "external", "running", "--no-metadata",
					"--memspec", "file=" + file + ",snapshot=external"}, options...)...)
				lostAsRecorded(t, clock, before, nil)
				if s := status(t, d); s.Dropped+s.Anchored != s0.Dropped+s0.Anchored+1 || s.Held != 0 || s.Disagreements != 0 {
					t.Errorf("status: %+v", withoutRecords(s))
				}
			}
			clock.Close()
			ended(t, d)
			mustVirsh(t, "restore", file)
			clock = domaintest.Clock(t, d)
			r := restored(t, d, clock)
			if c.name == "default" { // no anchor was published
				checkRestored(t, r, c.name, 0)
				return
			}
			checkRestored(t, r, c.name, clockpage.FromImport)
			carriedOn(t, clock, first, c.name)
			clock.Close()
			mustVirsh(t, "snapshot-create-as", "external", "halted", "--no-metadata", "--halt",
				"--memspec", "file="+file+",snapshot=external")
			awaitState(t, d, libvirt.DOMAIN_SHUTOFF)
			nothingLeft(t)
			time.Sleep(rulePause)
			mustVirsh(t, "restore", file)
			clock = domaintest.Clock(t, d)
			checkRestored(t, restored(t, d, clock), c.name, clockpage.FromImport)
			carriedOn(t, clock, first, c.name)
		})
	}
}

// A saved state that is restored on another host, which knows nothing of its stop, is caught up from the anchor that came with it.
func TestKVMARestoreOnAnotherHost(t *testing.T) {
	second, there := secondHost(t)
	file := saveFile(t, "elsewhere.state")
	for _, c := range restoreRules {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("elsewhere", c.clock))
			uuid := domaintest.UUID(t, d)
			endsThere(t, there, "elsewhere")
			pause(t, d, 5*time.Millisecond)
			ftclock(t, "anchor", "publish")
			before := offset(t, clock)
			clock.Close()
			mustVirsh(t, "save", "elsewhere", file)
			nothingLeft(t)
			if err := os.Remove(filepath.Join(host.DataDir, uuid+".json")); err != nil { // the two have this directory in common
				t.Fatal(err)
			}
			time.Sleep(rulePause)
			mustVirsh(t, "-c", second.URI, "restore", file)
			moved := domaintest.Lookup(t, there, "elsewhere")
			clock = domaintest.ClockOfProcess(t, pidOn(t, second.Dir, "elsewhere"))
			pauses(t, moved, 5, 5*time.Millisecond)
			s := domaintest.StatusOf(t, second.Dir+control.Dir, uuid)
			r := s.Records[0]
			t.Logf("%s, %s: %s; %v lost; warnings %q", r.Event, r.Decision, r.Reason, time.Duration(r.Lost), s.Warnings)
			checkRestored(t, r, c.name, clockpage.FromImport)
			if r.Event != clockpage.Restore {
				t.Errorf("a restored state is taken for something else: %+v", r)
			}
			asRecorded(t, clock, r)
			carriedOn(t, clock, before, c.name)
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// Whoever edits the anchor in a running domain's metadata moves that domain's clock when it is restored, and no other, by no more than
// the rule's limit, and never back.
func TestKVMAnEditedAnchor(t *testing.T) {
	const limit = 5 * time.Minute // however long it takes to save and restore it here
	file := saveFile(t, "edited.state")
	d, clock := start(t, managed("edited", clockWith(`<ftclock:on event="restore" do="catch-up" limit="5m"/>`)))
	uuid := domaintest.UUID(t, d)
	bystander, others := domaintest.Start(t, conn, managed("bystander", clockElement))
	pause(t, bystander, 5*time.Millisecond)
	othersBefore := offset(t, others)

	changed := func(change func(a *metadata.Anchor)) func(string) string {
		return func(xml string) string {
			a := check.Value(metadata.ParseAnchor([]byte(xml)))(t)
			change(&a)
			return a.XML()
		}
	}
	const hour = uint64(time.Hour)
	for i, c := range []struct {
		name   string
		edit   func(anchor string) string
		moved  time.Duration // what the guest's clock is moved by, beyond the time that it was away
		reason clockpage.Reason
	}{
		{"by 3 s", changed(func(a *metadata.Anchor) { a.Clock += 3e9 }), 3 * time.Second, clockpage.FromImport},
		{"by fifty years", changed(func(a *metadata.Anchor) { a.Clock += 50 * 365 * 24 * hour }), 0, clockpage.Bounds},
		{"more than can be", changed(func(a *metadata.Anchor) { a.Clock = 1 << 63 }), 0, clockpage.First},
		{"back to zero", changed(func(a *metadata.Anchor) { a.Clock = 0 }), 0, clockpage.NeverBack},
		{"from the future", changed(func(a *metadata.Anchor) { a.Raw, a.Real = a.Raw+hour, a.Real+hour }), 0, clockpage.Bounds},
		{"by an hour", changed(func(a *metadata.Anchor) { a.Clock += hour }), 0, clockpage.OverLimit},
		{"garbage", func(string) string { return `<anchor clock="many" real="\u2026" boot="&lt;&amp;"/>` }, 0, clockpage.First},
		{"another element", func(string) string { return `<time><anchor/></time>` }, 0, clockpage.First},
		{"from another host's future", changed(func(a *metadata.Anchor) { a.Boot, a.Real = "another", a.Real+hour }), 0, clockpage.Bounds},
	} {
		if i%3 != 0 && os.Getenv("FTCLOCK_LONG") != "1" {
			continue // package shim's tests have all of them
		}
		t.Run(c.name, func(t *testing.T) {
			pause(t, d, 5*time.Millisecond)
			ftclock(t, "anchor", "publish")
			xml := check.Value(virsh("metadata", "edited", metadata.AnchorNamespace))(t)
			mustVirsh(t, "metadata", "edited", metadata.AnchorNamespace, "--live", "--key", "ftclock-anchor", "--set", c.edit(strings.TrimSpace(xml)))
			before := offset(t, clock)
			clock.Close()
			mustVirsh(t, "save", "edited", file)
			// As on a host that knows nothing of its stop. The shim writes that down when QEMU has ended.
			check.Await(t, time.Minute, time.Millisecond, func() bool { return os.Remove(filepath.Join(host.DataDir, uuid+".json")) == nil }, "the shim left no reading")
			time.Sleep(rulePause)
			mustVirsh(t, "restore", file)
			clock = check.Value(d.Clock())(t)
			for range 3 {
				pause(t, d, 5*time.Millisecond)
				pause(t, bystander, 5*time.Millisecond)
			}
			s := status(t, d)
			r := s.Records[0]
			lost := offset(t, clock) - before
			t.Logf("%s, %s: %s; %v lost, the guest %v; warnings %q", r.Event, r.Decision, r.Reason, time.Duration(r.Lost), time.Duration(lost), s.Warnings)
			if r.Reason != c.reason || r.WentOn < r.Saved || r.WentOn > r.Saved+uint64(limit) {
				t.Errorf("record: %+v", r)
			}
			switch {
			case c.moved != 0 && (lost < -int64(c.moved)-maxFailover || lost > -int64(c.moved)+maxFailover):
				t.Errorf("the guest lost %d ns, want %v", lost, -c.moved)
			case c.moved == 0 && lost < int64(rulePause):
				t.Errorf("the guest lost only %d ns", lost)
			}
			asRecorded(t, clock, r)
			domaintest.NoBacksteps(t, clock)
		})
		if t.Failed() {
			return
		}
	}
	lostAsRecorded(t, others, othersBefore, nil)
	domaintest.NoBacksteps(t, others)
	if s := status(t, bystander); s.State != control.Correcting || s.Held+s.Passed > 1 || s.Reanchored != 0 || s.Disagreements != 0 {
		t.Errorf("the bystander's status: %+v", withoutRecords(s))
	}
}

// Machine types of QEMU 2.8 and older save another value of the clock than that of the last stop. Such a state isn't caught up, and
// the domain's status says why.
func TestKVMAnOldMachineTypeIsRestored(t *testing.T) {
	for _, c := range []struct {
		name, clock string
		warns       bool
	}{
		{"oldcaughtup", clockWith(`<ftclock:on event="restore" do="catch-up"/>`), true},
		{"oldheld", clockElement, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := saveFile(t, c.name+".state")
			x := managed(c.name, c.clock)
			// What the machine types have of it (hw/i386/pc_piix.c).
			privatelibvirt.AddArguments(x, "-global", "kvmclock.x-mach-use-reliable-get-clock=off")
			d := define(t, x)
			if err := d.Create(); err != nil && strings.Contains(err.Error(), "x-mach-use-reliable-get-clock' not found") {
				t.Log("this QEMU has no such machine types any more")
				return
			} else if err != nil {
				t.Fatal(err)
			}
			_ = domaintest.Clock(t, d)
			pause(t, d, 5*time.Millisecond)
			mustVirsh(t, "save", c.name, file)
			time.Sleep(time.Second)
			mustVirsh(t, "restore", file)
			_ = domaintest.Clock(t, d)
			s := status(t, d)
			t.Logf("%+v; %q", s.Records, s.Warnings)
			if r := s.Records[0]; r.Decision != clockpage.Passed || r.Reason != clockpage.First {
				t.Errorf("the restore: %+v", r)
			}
			if warns := slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "isn't the one of the last stop on this host") }); warns != c.warns {
				t.Errorf("it warns of it: %v; %q", warns, s.Warnings)
			}
			pause(t, d, 5*time.Millisecond)
			if s := status(t, d); s.Records[1].Decision != clockpage.Dropped {
				t.Errorf("a pause after it: %+v", s.Records[1])
			}
		})
	}
}

// A stock Linux that is caught up over nearly a quarter of an hour, the most there is, says nothing of it: no stall, no lockup, no clock that is taken for bad.
// Nobody waits for so long: the reading that it goes on from is made older.
func TestKVMAQuarterOfAnHour(t *testing.T) {
	const away = 13 * time.Minute // a starved machine may take minutes for the restore itself
	image := linuxImage(t)
	file := saveFile(t, "away.state")
	x := linuxguest.XML("away", image, 2)
	privatelibvirt.Manage(x, clockWith(`<ftclock:on event="restore" do="catch-up" limit="15m"/>`))
	d, clocks := boot(t, x)
	pause(t, d, 5*time.Millisecond)
	before := offset(t, clocks.Monotonic)
	booted := check.Value(linuxguest.ReadLog(linuxguest.Console(d.Name)))(t)
	_ = clocks.Close()
	mustVirsh(t, "save", d.Name, file)
	nothingLeft(t)
	uuid := domaintest.UUID(t, d)
	lastStop := filepath.Join(host.DataDir, uuid+".json")
	text := check.Value(os.ReadFile(lastStop))(t)
	var stop map[string]any
	numbers := json.NewDecoder(bytes.NewReader(text))
	numbers.UseNumber()
	check.NoError(t, numbers.Decode(&stop))
	real := check.Value(stop["real_ns"].(json.Number).Int64())(t)
	stop["real_ns"], stop["boot_id"] = real-int64(away), "" // by CLOCK_REALTIME, as after a boot
	check.NoError(t, os.WriteFile(lastStop, check.Value(json.Marshal(stop))(t), 0o600))
	mustVirsh(t, "restore", file)
	clocks = linuxClocks(t, d)
	lost := offset(t, clocks.Monotonic) - before + int64(away)
	t.Logf("away for %v more than it was, it lost %d ns", away, lost)
	check.Within(t, lost, maxRestored, "it lost")
	// The kernel's watchdogs look for 20 s and more.
	for range 4 {
		time.Sleep(10 * time.Second)
		pause(t, d, 5*time.Millisecond)
	}
	log := check.Value(linuxguest.ReadLog(linuxguest.Console(d.Name)))(t)
	if len(log.Complaints) > len(booted.Complaints) {
		t.Errorf("its kernel complains: %q", log.Complaints[len(booted.Complaints):])
	}
	if s := status(t, d); s.Records[0].Decision != clockpage.Anchored || s.State != control.Correcting {
		t.Errorf("status: %s, %+v", s.State, s.Records[0])
	}
}
