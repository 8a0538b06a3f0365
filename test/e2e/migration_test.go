package e2e

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/control"
	"ftclock/host"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"
)

// The time for which a guest stands still in its migration is caught up on the other host, by CLOCK_REALTIME and the
// anchor that came with the domain, or isn't, as the metadata says.
func TestKVMAMigrationIsCaughtUp(t *testing.T) {
	second, there := secondHost(t)
	dir, err := privatelibvirt.QEMUDir("migration")
	if err != nil {
		t.Fatal(err)
	}
	socket := "unix://" + filepath.Join(dir, "caught-up.sock")

	const rule = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="migrate" %s/></ftclock:clock>`
	for _, c := range []struct {
		name, metadata   string
		published        bool
		held             bool
		decision, reason string
		warning          string
	}{
		{"default", clockElement, true, false, "anchored", "by its earlier reading", ""},
		{"hold", strings.Replace(rule, "%s", `do="hold"`, 1), true, true, "held", "the policy says hold", ""},
		{"past its limit", strings.Replace(rule, "%s", `do="catch-up" limit="1ms"`, 1), true, true, "held", "longer than its limit", "longer than the limit"},
		{"without an anchor", clockElement, false, true, "passed", "no stop seen before", "no anchor came with it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, clock := start(t, managed("migrated", c.metadata))
			uuid, err := d.GetUUIDString()
			if err != nil {
				t.Fatal(err)
			}
			endsThere(t, there, "migrated")
			before := offset(t, clock)
			if c.published {
				publish(t, second, privatelibvirt.URI) // before any pause: the guest's clock is known since its start
			}
			stateAway(t, second, socket)
			found, err := there.LookupDomainByName("migrated")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = found.Free() }()
			moved := &privatelibvirt.Domain{Domain: found, Name: d.Name}
			clock = clockOfPID(t, pidOn(t, second.Dir, "migrated"))
			pause(t, moved, 5*time.Millisecond)
			lost := offset(t, clock) - before
			answer, err := control.Ask(second.Dir+control.Dir, uuid, control.Request{Do: "status", Records: 256})
			if err != nil {
				t.Fatal(err)
			}
			s := answer.Status
			t.Logf("the migration cost the guest's clock %d ns; %+v; warnings %q", lost, s.Records, s.Warnings)
			r := s.Records[0]
			if r.Decision != c.decision || !strings.Contains(r.Reason, c.reason) || c.published && r.Event != "migrate" {
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
			if count, largest, err := clock.Backsteps(); err != nil || count != 0 {
				t.Errorf("the guest saw time go back %d times, by up to %d ns: %v", count, largest, err)
			}
		})
	}
}

// secondHost starts a second libvirt, to migrate to, that goes with the test.
func secondHost(t *testing.T, qemuConf ...string) (*privatelibvirt.Second, *libvirt.Connect) {
	t.Helper()
	second, err := privatelibvirt.StartSecond(qemuConf...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := second.Stop(); err != nil {
			t.Error(err)
		}
	})
	conn, err := second.Connect()
	if err != nil {
		t.Fatal(err)
	}
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
	if out, err := virsh("migrate", "migrated", second.URI, "--live", "--migrateuri", socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
