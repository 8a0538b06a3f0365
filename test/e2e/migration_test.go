package e2e

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"
)

// The time for which a guest stands still in its migration is caught up on the other host, by CLOCK_REALTIME and the
// anchor that came with the domain, or isn't, as the metadata says.
func TestKVMAMigrationIsCaughtUp(t *testing.T) {
	second, there := secondHost(t)
	dir := check.Value(privatelibvirt.QEMUDir("migration"))(t)
	socket := "unix://" + filepath.Join(dir, "caught-up.sock")

	const rule = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="migrate" %s/></ftclock:clock>`
	for _, c := range []struct {
		name, metadata string
		published      bool
		held           bool
		decision       clockpage.Decision
		reason         clockpage.Reason
		warning        string
	}{
		{"default", clockElement, true, false, clockpage.Anchored, clockpage.FromImport, ""},
		{"hold", strings.Replace(rule, "%s", `do="hold"`, 1), true, true, clockpage.Held, clockpage.ByThePolicy, ""},
		{"past its limit", strings.Replace(rule, "%s", `do="catch-up" limit="1ms"`, 1), true, true, clockpage.Held, clockpage.OverLimit, "longer than the limit"},
		{"without an anchor", clockElement, false, true, clockpage.Passed, clockpage.First, "no anchor came with it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("migrated", c.metadata))
			uuid := domaintest.UUID(t, d)
			endsThere(t, there, "migrated")
			before := offset(t, clock)
			if c.published {
				publish(t, second, privatelibvirt.URI) // before any pause: the guest's clock is known since its start
			}
			stateAway(t, second, socket)
			moved := domaintest.Lookup(t, there, d.Name)
			clock = domaintest.ClockOfProcess(t, pidOn(t, second.Dir, "migrated"))
			pause(t, moved, 5*time.Millisecond)
			lost := offset(t, clock) - before
			s := domaintest.StatusOf(t, second.Dir+control.Dir, uuid)
			t.Logf("the migration cost the guest's clock %d ns; %+v; warnings %q", lost, s.Records, s.Warnings)
			r := s.Records[0]
			if r.Decision != c.decision || r.Reason != c.reason || c.published && r.Event != clockpage.Migrate {
				t.Errorf("the record says %s, %s: %s", r.Event, r.Decision, r.Reason)
			}
			if !c.held && (lost > maxMigration || lost < -maxMigration) {
				t.Errorf("the migration cost the guest's clock %d ns", lost)
			}
			if c.held && lost < int64(time.Millisecond) {
				t.Errorf("the migration cost the guest's clock only %d ns, which isn't the downtime", lost)
			}
			warnings := slices.DeleteFunc(slices.Clone(s.Warnings), func(w string) bool {
				return strings.Contains(w, "host's clock is synchronised") && unsynchronised() && c.name != "hold"
			})
			if said := strings.Join(warnings, "; "); (c.warning == "") != (said == "") || !strings.Contains(said, c.warning) {
				t.Errorf("the warnings are %q, want %q", said, c.warning)
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// secondHost starts a second libvirt, to migrate to, that goes with the test.
func secondHost(t *testing.T, qemuConf ...string) (*privatelibvirt.Second, *libvirt.Connect) {
	t.Helper()
	second := check.Value(privatelibvirt.StartSecond(qemuConf...))(t)
	t.Cleanup(func() {
		if err := second.Stop(); err != nil {
			t.Error(err)
		}
	})
	conn := check.Value(second.Connect())(t)
	t.Cleanup(func() { _, _ = conn.Close() })
	return second, conn
}

// endsThere has a domain that was migrated to the second host end there with the test.
func endsThere(t *testing.T, there *libvirt.Connect, name string) {
	t.Helper()
	t.Cleanup(func() {
		if d, err := there.LookupDomainByName(name); err == nil {
			_ = d.Destroy()
			_ = d.Free()
		}
	})
}

// unsynchronised says whether nobody keeps this machine's clock right.
func unsynchronised() bool {
	clock, err := host.ReadClock()
	return err != nil || !clock.Synchronised
}

// maxMigration bounds what a migration may cost the guest's clock, ns: a guest that was never paused before has its clock
// known since its start only, which the shim says is to 200 us.
var maxMigration = kvmhost.Stretched(300_000)

// stateAway migrates the guest to the second host.
func stateAway(t *testing.T, second *privatelibvirt.Second, socket string) {
	t.Helper()
	mustVirsh(t, "migrate", "migrated", second.URI, "--live", "--migrateuri", socket)
}
