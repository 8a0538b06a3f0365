package e2e

import (
	"path/filepath"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
)

// Live migrations between two hosts, in more than one way, with the same results as without the shim, be it on the monitor or beside it; the
// clock is kept on both.
func TestKVMMigration(t *testing.T) {
	second, there := secondHost(t)

	var without []string
	t.Run("without", func(t *testing.T) { without = migrate(t, second, there, "") })
	if t.Failed() {
		return
	}
	for name, clock := range map[string]string{"with": clockElement, "direct": directClock} {
		t.Run(name, func(t *testing.T) {
			for i, output := range migrate(t, second, there, clock) {
				if without == nil { // -run left it out
					continue
				}
				t.Logf("migration %d: without: %q, with: %q", i+1, without[i], output)
				if output != without[i] {
					t.Error("that is different")
				}
			}
		})
	}
}

// migrate starts a domain here, migrates it there, back and there again, and gives what virsh printed.
func migrate(t *testing.T, second *privatelibvirt.Second, there *libvirt.Connect, metadata string) (outputs []string) {
	x := managed("migrated", metadata)
	dir := check.Value(privatelibvirt.QEMUDir("migration"))(t)
	d, clock := start(t, x)
	// It ends there. This goes first: what is left is looked for when the domain is removed here.
	endsThere(t, there, "migrated")
	uuid := domaintest.UUID(t, d)
	// One that fails leaves the guest where it is.
	out, err := virsh("migrate", "migrated", second.URI, "--live", "--migrateuri", "unix:///no/such/directory/migration.sock")
	if err == nil {
		t.Errorf("it was migrated to nowhere:\n%s", out)
	}
	outputs = append(outputs, out)
	checkOn(t, d, clock, control.Dir, uuid, metadata != "")
	socket := []string{"--migrateuri", "unix://" + filepath.Join(dir, "migration.sock")}
	for _, leg := range []struct {
		from, to string
		options  []string
		conn     *libvirt.Connect
		root     string // where the files of the host that it comes to are
	}{
		{privatelibvirt.URI, second.URI, socket, there, second.Dir},
		{second.URI, privatelibvirt.URI, socket, conn, ""},
		{privatelibvirt.URI, second.URI, []string{"--p2p", "--tunnelled"}, there, second.Dir},
	} {
		before, lead, khz := offset(t, clock), int64(0), uint64(0)
		loops := check.Value(clock.Steady())(t).Loops
		if metadata != "" {
			publish(t, second, leg.from)
			from := ""
			if leg.from == second.URI {
				from = second.Dir
			}
			khz = publishedKHz(t, from+control.Dir, uuid)
			lead = tscLead(t, clock, khz)
		}
		out, err := virsh(append([]string{"-c", leg.from, "migrate", "migrated", leg.to, "--live"}, leg.options...)...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		outputs = append(outputs, out)
		moved := domaintest.Lookup(t, leg.conn, d.Name)
		clock = domaintest.ClockOfProcess(t, pidOn(t, leg.root, "migrated"))
		lost := offset(t, clock) - before
		if again := check.Value(clock.Steady())(t).Loops; again < loops {
			t.Fatalf("the guest booted anew: it had read its clocks %d times, and has %d times", loops, again)
		}
		t.Logf("the migration cost the guest's clock %d ns", lost)
		if metadata != "" && (lost > maxFailover || lost < -maxFailover) {
			t.Errorf("migrated from %s to %s: it cost the guest's clock %d ns", leg.from, leg.to, lost)
		}
		if metadata == "" && lost < int64(time.Millisecond) {
			t.Errorf("without ftclock it cost only %d ns, which isn't its downtime", lost)
		}
		if metadata != "" {
			wentTogether(t, lead, tscLead(t, clock, khz))
		}
		checkOn(t, moved, clock, leg.root+control.Dir, uuid, metadata != "")
		if metadata != "" {
			wentTogether(t, lead, tscLead(t, clock, khz))
			migrated(t, leg.root+control.Dir, uuid, false)
		}
	}
	return outputs
}

// publish has the anchors of the running domains travel with them, as the timer does, on the host whose libvirt is at uri.
func publish(t *testing.T, second *privatelibvirt.Second, uri string) {
	t.Helper()
	if uri != second.URI {
		ftclock(t, "anchor", "publish")
	} else if out, err := second.Command(privatelibvirt.Prefix+"/bin/ftclock", "anchor", "publish").CombinedOutput(); err != nil {
		t.Fatalf("publishing on the second host: %v\n%s", err, out)
	}
}

// checkOn checks that the clock is kept where the guest is, if it is to be.
func checkOn(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock, state, uuid string, kept bool) {
	t.Helper()
	pause(t, d, sweepPause) // takes the anchor
	before := offset(t, clock)
	pauses(t, d, 20, sweepPause)
	drift := offset(t, clock) - before
	if !kept {
		if drift < 20*int64(sweepPause) {
			t.Errorf("the guest lost only %d ns", drift)
		}
		return
	}
	check.Within(t, drift, kvmhost.Stretched(maxDrift), "drift after 20 checkpoints") // what a restore was written off by is taken back
	domaintest.NoBacksteps(t, clock)
	if s := domaintest.StatusOf(t, state, uuid); s.State != control.Correcting || s.Disagreements != 0 || (len(s.Warnings) != 0 && !unsynchronised()) || s.Dropped+s.Anchored < 20 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
}
