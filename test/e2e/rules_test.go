package e2e

import (
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"
)

// A rule is a policy, and what it makes of a pause of rulePause.
type rule struct {
	name, clock string
	caughtUp    bool
	event       clockpage.Event
	reason      clockpage.Reason // of a pause that is held
}

const rulePause = 300 * time.Millisecond

// rules has each way in which the metadata can treat a pause on the same host.
var rules = []rule{
	{"default", clockElement, true, clockpage.Checkpoint, 0},
	{"checkpoints are held", clockWith(`<ftclock:on event="checkpoint" do="hold"/>`), false, clockpage.Checkpoint, clockpage.ByThePolicy},
	{"a suspend", clockWith(`<ftclock:on event="checkpoint" limit="100ms"/>`), false, clockpage.Suspend, clockpage.ByThePolicy},
	{"a suspend is caught up", clockWith(`<ftclock:on event="checkpoint" limit="100ms"/><ftclock:on event="suspend" do="catch-up"/>`),
		true, clockpage.Suspend, 0},
	{"a suspend past its limit", clockWith(`<ftclock:on event="checkpoint" limit="100ms"/><ftclock:on event="suspend" do="catch-up" limit="150ms"/>`),
		false, clockpage.Suspend, clockpage.OverLimit},
}

// setPolicy changes the policy of a running domain, as ftclock enable --live does.
func setPolicy(t *testing.T, d *privatelibvirt.Domain, clock string) {
	t.Helper()
	check.Value(control.Ask(control.Dir, domaintest.UUID(t, d), control.Request{Do: "policy", Clock: clock}))(t)
}

// underRules pauses the domain once under each of the rules, and checks the guest's clock from outside and the record. pause
// stops the guest in the way that is tested, waits for rulePause and lets it run again; ordered says whether the shim
// sees the cont.
func underRules(t *testing.T, rules []rule, d *privatelibvirt.Domain, clock *guest.Clock, ordered bool, pauseOnce func(t *testing.T)) {
	t.Helper()
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) { underRule(t, d, clock, r, ordered, pauseOnce) })
	}
	setPolicy(t, d, clockElement)
}

func underRule(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock, r rule, ordered bool, pauseOnce func(t *testing.T)) {
	t.Helper()
	setPolicy(t, d, r.clock)
	before, s0 := offset(t, clock), status(t, d)
	pauseOnce(t)
	pause(t, d, 5*time.Millisecond) // must not catch up after all what was held
	s := status(t, d)
	if s.Pauses != s0.Pauses+2 {
		t.Fatalf("%d pauses, want 2", s.Pauses-s0.Pauses)
	}
	rec := s.Records[len(s.Records)-2]
	lost := lostAsRecorded(t, clock, before, s.Records[len(s.Records)-2:])
	t.Logf("%s, %s: %s; %v lost of %v", rec.Event, rec.Decision, rec.Reason, time.Duration(lost), time.Duration(rec.Lost))
	if rec.Lost < int64(rulePause) {
		t.Errorf("the record knows only of %v", time.Duration(rec.Lost))
	}
	if rec.Event != r.event || (rec.Ordered == 1) != ordered {
		t.Errorf("taken for a %s, ordered %v; want a %v, %v", rec.Event, rec.Ordered, r.event, ordered)
	}
	caughtUp := rec.Decision == clockpage.Dropped || rec.Decision == clockpage.Anchored
	if caughtUp != r.caughtUp || !caughtUp && (rec.Decision != clockpage.Held || rec.Reason != r.reason) {
		t.Errorf("%s: %s; want caught up: %v, reason: %v", rec.Decision, rec.Reason, r.caughtUp, r.reason)
	}
	if s.Anchor.Epoch != s0.Anchor.Epoch || s.Anchor.Valid != 1 || s.Disagreements != s0.Disagreements {
		t.Errorf("status before %+v\nstatus after %+v", withoutRecords(s0), withoutRecords(s))
	}
	domaintest.NoBacksteps(t, clock)
}

// lostAsRecorded checks that the guest has lost since the offset before what the records of its pauses say, and gives it
// in ns. A pause that is held ends somewhere in the module's write.
func lostAsRecorded(t *testing.T, clock *guest.Clock, before int64, records []clockpage.Record) int64 {
	t.Helper()
	least, most := int64(-maxDrift), int64(maxDrift)
	if len(records) > 0 { // one of them may have written the clock
		least, most = kvmhost.Stretched(least), kvmhost.Stretched(most)
	}
	for _, r := range records {
		if r.Decision == clockpage.Held {
			least += r.Lost
			most += r.Lost + int64(r.Cost)
		}
	}
	lost := offset(t, clock) - before
	if lost < least || lost > most {
		t.Errorf("the guest lost %d ns, by the record it should have been %d to %d", lost, least, most)
	}
	return lost
}

func withoutRecords(s *control.Status) control.Status {
	c := *s
	c.Records = nil
	return c
}

// handsOf lets the test act inside the domain's guest.
func handsOf(t *testing.T, d *privatelibvirt.Domain) *guest.Hands {
	t.Helper()
	hands := check.Value(guest.OpenHands(domaintest.PID(t, d)))(t)
	t.Cleanup(func() { _ = hands.Close() })
	return hands
}
