package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"
)

// maxRestored is what a guest may be off right after a restore, ns; the next pause corrects it.
const maxRestored = 1_000_000

// tscLead is how far a guest's TSC, in ns of its kvmclock, is ahead of it.
func tscLead(t *testing.T, clock *guest.Clock, khz uint64) int64 {
	t.Helper()
	var least int64
	// The guest reads the TSC last: the smallest of what was seen does.
	for i := range 2000 {
		r := check.Value(clock.Steady())(t)
		if lead := int64(float64(r.TSC)*1e6/float64(khz)) - r.Clock; i == 0 || lead < least {
			least = lead
		}
	}
	return least
}

// wentTogether checks that a guest's TSC and its clock are where they were to each other, within what their reading takes.
func wentTogether(t *testing.T, before, after int64) {
	t.Helper()
	t.Logf("its TSC moved against its clock by %d ns", after-before)
	check.Within(t, after-before, kvmhost.Stretched(1000), "the TSC and the clock went apart")
}

// What moves a guest's clock moves its TSC by as much: after a restore that was caught up, the two are where they were to each
// other.
func TestKVMTheTSCGoesWithTheClock(t *testing.T) {
	file := saveFile(t, "both.state")
	d, _ := start(t, managed("both", restoreRules[1].clock))
	pause(t, d, 5*time.Millisecond)
	uuid := domaintest.UUID(t, d)
	khz := publishedKHz(t, control.Dir, uuid)
	before := tscLead(t, domaintest.Clock(t, d), khz)
	mustVirsh(t, "save", "both", file)
	nothingLeft(t)
	time.Sleep(3 * time.Second)
	mustVirsh(t, "restore", file)
	clock := domaintest.Clock(t, d)
	wentTogether(t, before, tscLead(t, clock, khz))
	pause(t, d, 5*time.Millisecond)
	wentTogether(t, before, tscLead(t, clock, khz))
	if s := status(t, d); s.Records[0].Decision != clockpage.Anchored || s.Records[0].TSC != clockpage.TSCMoved {
		t.Errorf("the restore: %+v", s.Records[0])
	}
}

// onTSC is a Linux guest's command line with the TSC for its clock source.
func onTSC(cmdline string) string {
	return strings.Replace(cmdline, "clocksource=kvm-clock", "clocksource=tsc tsc=reliable", 1)
}

// ownRate is how a guest's clock runs by itself. One on tsc makes its own of the TSC's frequency, up to 100 ns a second beside it.
type ownRate struct {
	raw, offset int64   // CLOCK_MONOTONIC_RAW, and the guest's offset then, ns
	rate        float64 // by which the offset grows
}

func ownRateOf(t *testing.T, clock *guest.Clock) ownRate {
	t.Helper()
	first, began := offset(t, clock), guest.Raw()
	time.Sleep(15 * time.Second)
	last, ended := offset(t, clock), guest.Raw()
	o := ownRate{ended, last, float64(last-first) / float64(ended-began)}
	t.Logf("by itself the guest's clock loses %.0f ns a second", o.rate*1e9)
	return o
}

// lost is what the guest's clock lost since, beside what it loses by itself, ns.
func (o ownRate) lost(t *testing.T, clock *guest.Clock) int64 {
	t.Helper()
	now := offset(t, clock)
	return now - o.offset - int64(o.rate*float64(guest.Raw()-o.raw))
}

// A Linux that reads its time from the TSC goes on as if it had never been away, too, on every vCPU.
func TestKVMATSCGuestIsRestored(t *testing.T) {
	image := linuxImage(t)
	file := saveFile(t, "tsc.state")
	const away = 5 * time.Second
	for _, c := range []struct{ name, metadata string }{{"tsc-stock", ""}, {"tsc", restoreRules[1].clock}} {
		t.Run(c.name, func(t *testing.T) {
			x := linuxguest.XML(c.name, image, 2)
			x.OS.Cmdline = onTSC(x.OS.Cmdline)
			privatelibvirt.Manage(x, c.metadata)
			d, clocks := boot(t, x)
			pause(t, d, 5*time.Millisecond)
			// The first vCPU reads all the time, and is the one to be measured. That the others agree with it shows below.
			before := ownRateOf(t, clocks.Monotonic)
			_ = clocks.Close()
			mustVirsh(t, "save", c.name, file)
			time.Sleep(away)
			mustVirsh(t, "restore", file)
			clocks = linuxClocks(t, d)
			lost := before.lost(t, clocks.Monotonic)
			pause(t, d, 5*time.Millisecond)
			later := before.lost(t, clocks.Monotonic)
			t.Logf("CLOCK_MONOTONIC lost %d ns in the restore, %d after a pause", lost, later)
			switch limit := kvmhost.Stretched(maxDrift); {
			case c.metadata == "" && lost < int64(away/2):
				t.Errorf("it lost only %d ns: the measuring doesn't work, or something corrects the clock", lost)
			case c.metadata != "" && (lost > maxRestored || lost < -maxRestored):
				t.Errorf("it lost %d ns in the restore", lost)
			case c.metadata != "" && (later > limit || later < -limit):
				t.Errorf("it lost %d ns in all", later)
			}
			log := check.Value(linuxguest.ReadLog(linuxguest.Console(d.Name)))(t)
			if n := len(log.Lines); n == 0 || log.Lines[n-1].Source != "tsc" {
				t.Errorf("the guest's clock source isn't tsc: %+v", log.Lines)
			}
			if c.metadata == "" {
				return
			}
			if s := status(t, d); s.Records[0].TSC != clockpage.TSCMoved {
				t.Errorf("the restore: %+v", s.Records[0])
			}
			neverBack(t, clocks)
		})
	}
}

// And so it does after a live migration.
func TestKVMATSCGuestMigrates(t *testing.T) {
	image := linuxImage(t)
	second, there := secondHost(t)
	dir := check.Value(privatelibvirt.QEMUDir("migration"))(t)
	x := linuxguest.XML("tsc-migrates", image, 2)
	x.OS.Cmdline = onTSC(x.OS.Cmdline)
	privatelibvirt.Manage(x, clockElement)
	d, clocks := boot(t, x)
	endsThere(t, there, d.Name)
	pause(t, d, 5*time.Millisecond)
	publish(t, second, privatelibvirt.URI)
	before := ownRateOf(t, clocks.Monotonic)
	_ = clocks.Close()
	mustVirsh(t, "migrate", d.Name, second.URI, "--live", "--migrateuri", "unix://"+filepath.Join(dir, "tsc.sock"))
	moved := domaintest.Lookup(t, there, d.Name)
	clocks = check.Value(linuxguest.Open(pidOn(t, second.Dir, d.Name), 2*time.Minute))(t)
	t.Cleanup(func() { _ = clocks.Close() })
	lost := before.lost(t, clocks.Monotonic)
	pause(t, moved, 5*time.Millisecond)
	later := before.lost(t, clocks.Monotonic)
	t.Logf("CLOCK_MONOTONIC lost %d ns in the migration, %d after a pause", lost, later)
	check.Within(t, lost, maxRestored, "it lost in the migration")
	check.Within(t, later, kvmhost.Stretched(maxDrift), "it lost in all")
	neverBack(t, clocks)
	uuid := domaintest.UUID(t, d)
	migrated(t, second.Dir+control.Dir, uuid, false)
}

// publishedKHz is the frequency of a guest's TSC, as its anchor says.
func publishedKHz(t *testing.T, state, uuid string) uint64 {
	t.Helper()
	answer := check.Value(control.Ask(state, uuid, control.Request{Do: "anchor"}))(t)
	if answer.Anchor == nil || answer.Anchor.KHz == 0 {
		t.Fatalf("the anchor says nothing of the TSC: %+v", answer.Anchor)
	}
	return answer.Anchor.KHz
}
