package e2e

import (
	"encoding/json"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/qmp"
	metadata "ftclock/xml-templates"
)

// maxFailover bounds what a failover may cost until the first pause, ns, where both hosts have the same clock: the reading that the
// guest goes on from, the write, and CLOCK_REALTIME, which runs at another rate than the guest's clock, as the export says.
const maxFailover = 100_000

// The primary dies, and the backup goes on from the last checkpoint, which is a while old.
func TestKVMFailover(t *testing.T) {
	const hour = int64(time.Hour)
	for _, c := range []struct {
		name     string
		change   map[string]any // what the export is changed by
		boot     string         // and its boot's id
		off      int64          // ns that the backup's guest is behind by where it is caught up; else it is by what it was away
		decision clockpage.Decision
		reason   clockpage.Reason
		rule     string // of the migration; "" is the default
	}{
		{"held", nil, "", 0, clockpage.Held, clockpage.ByThePolicy, `do="hold"`},
		{"longer ago than its limit", nil, "", 0, clockpage.Held, clockpage.OverLimit, `do="catch-up" limit="100ms"`},
		{"within its limit", nil, "", 0, clockpage.Anchored, clockpage.FromImport, `do="catch-up" limit="30s"`},
		{"on the same host", nil, "", 0, clockpage.Anchored, clockpage.FromImport, ""},
		{"on another host, from one that isn't synchronised", map[string]any{"synchronised": false, "host_error_ns": 250_000_000},
			"another", 0, clockpage.Anchored, clockpage.FromImport, ""},
		{"the backup's clock is 50 ms ahead", map[string]any{"real_ns": int64(-50e6)}, "another", -50e6, clockpage.Anchored, clockpage.FromImport, ""},
		{"the backup's clock is 10 s behind", map[string]any{"real_ns": int64(10e9)}, "another", 0, clockpage.Anchored, clockpage.NeverBack, ""},
		{"the backup's clock is an hour behind", map[string]any{"real_ns": hour}, "another", 0, clockpage.Passed, clockpage.Bounds, ""},
		{"the backup's clock is an hour ahead", map[string]any{"real_ns": -hour}, "another", 0, clockpage.Held, clockpage.OverLimit, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Cleanup(func() { nothingLeft(t) })
			p := primaryDies(t)
			var options []string
			if c.rule != "" {
				options = []string{"--clock", clockWith(`<ftclock:on event="migrate" ` + c.rule + `/>`)}
			}
			b := p.backup(t, options...)
			given := importChanged(t, p.export, b.pid, c.change, c.boot)
			sent := guest.Raw()
			execute(t, b.monitor, "cont", nil)
			answered := guest.Raw()
			clock := domaintest.ClockOfProcess(t, b.qemu.Process.Pid)
			s := statusOf(t, b.pid)
			r := s.Records[0]
			if r.Event != clockpage.Migrate || r.Decision != c.decision || r.Reason != c.reason {
				t.Errorf("the record says %s, %s: %s", r.Event, r.Decision, r.Reason)
			}
			// What the checkpoint has of the clock was read in the primary's stop, and written in the backup's cont.
			stood := int64(p.anchor.Raw + (r.Saved - p.anchor.Clock)) // CLOCK_MONOTONIC_RAW of that reading, ns
			if stood < p.stop || stood > p.stopped {
				t.Errorf("the checkpoint's clock was read at %d ns, the stop was from %d to %d", stood, p.stop, p.stopped)
			}
			if int64(r.ContRaw) < sent || int64(r.ContRaw+r.Cost) > answered {
				t.Errorf("the clock was written from %d to %d ns, the cont was from %d to %d", r.ContRaw, r.ContRaw+r.Cost, sent, answered)
			}
			least, most := c.off-maxFailover, c.off+maxFailover
			if c.reason != clockpage.FromImport {
				least, most = int64(r.ContRaw)-stood-maxDrift, int64(r.ContRaw+r.Cost)-stood+maxDrift
				if r.WentOn < r.Saved || r.WentOn > r.Saved+r.Cost { // the write may be made again, a little later
					t.Errorf("the guest's clock was at %d ns, and went on from %d", r.Saved, r.WentOn)
				}
			}
			off := offset(t, clock) - p.before
			t.Logf("the backup's guest is %d ns behind, want %d to %d: %s, %s; lost %d ns; warnings %q; the clock is known to %d ns", off, least, most,
				r.Decision, r.Reason, r.Lost, s.Warnings, s.Anchor.Error)
			if c.boot != "" && r.Error < given.HostError {
				t.Errorf("the record's error bound is %d ns, the primary's host alone had %d", r.Error, given.HostError)
			}
			if off < least || off > most {
				t.Errorf("the backup's guest is %d ns behind, want %d to %d", off, least, most)
			}
			known := given.Error
			if c.boot != "" {
				known += given.HostError
			}
			if r.Decision == clockpage.Anchored && s.Anchor.Error < known {
				t.Errorf("it claims to know the clock to %d ns, which the primary knew to %d", s.Anchor.Error, known)
			}
			if said, want := strings.Join(s.Warnings, "; "), ofSynchronisation(given, c.boot); (want == "") != (said == "") || !strings.Contains(said, want) {
				t.Errorf("the warnings are %q, want %q", said, want)
			}
			if r.Reason == clockpage.FromImport {
				wentTogether(t, p.lead, tscLead(t, clock, p.anchor.KHz))
			}
			for range 5 {
				b.pause(t, 5*time.Millisecond)
			}
			// What the write was off by is made good at the first pause.
			later := offset(t, clock) - p.before
			if limit := kvmhost.Stretched(maxDrift); later > off+limit || later < off-int64(r.Cost)-limit {
				t.Errorf("after 5 pauses more it is %d ns behind, before %d", later, off)
			}
			if c.boot == "" && c.reason == clockpage.FromImport && guest.Off(later) {
				t.Errorf("after 5 pauses more it is %d ns behind", later)
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// A guest that follows UTC ends where it would be had the clock of the host that it comes from been right. One that is ahead then is
// held back in its pauses, and not set back.
func TestKVMArrivesFromAHostWhoseClockWasWrong(t *testing.T) {
	const fast = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="utc" slew="100000ppm">` +
		`<ftclock:on event="migrate" do="catch-up" limit="15m"/></ftclock:clock>`
	t.Cleanup(func() { nothingLeft(t) })
	p := primaryDies(t)
	for _, c := range []struct {
		name   string
		ahead  time.Duration // what that clock was ahead by
		away   bool          // and the time that the guest was away on top
		reason clockpage.Reason
	}{
		{"behind", -50 * time.Millisecond, false, clockpage.FromImport},
		{"ahead", 50 * time.Millisecond, false, clockpage.FromImport},
		{"ahead by more than the guest was away", time.Second, true, clockpage.NeverBack},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b backup
			var r clockpage.Record
			var ahead int64
			for by := int64(c.ahead); ; by *= 3 { // a slow host needs longer to cont than it is to be ahead by
				ahead = by
				b = p.backup(t, "--clock", fast)
				if c.away {
					ahead += guest.Raw() - p.stop
				}
				importChanged(t, p.export, b.pid, map[string]any{"real_ns": ahead}, "another")
				execute(t, b.monitor, "cont", nil)
				r = statusOf(t, b.pid).Records[0]
				if !c.away || int64(r.ContRaw)-p.stop < ahead || by > int64(10*time.Second) {
					break
				}
				check.NoError(t, b.qemu.Process.Kill())
			}
			clock := domaintest.ClockOfProcess(t, b.qemu.Process.Pid)
			if r.Decision != clockpage.Anchored || r.Reason != c.reason {
				t.Errorf("the record says %s: %s", r.Decision, r.Reason)
			}
			// Until the checkpoint its clock ran at its own rate, since then it is to run as CLOCK_REALTIME does.
			faster := int64(float64(r.Saved-p.anchor.Clock) * float64(p.anchor.Rate) / 1e9)
			want := func() int64 { return ahead + faster - (guest.RealtimeAhead() - int64(p.anchor.Real-p.anchor.Raw)) }
			owes := want() - (offset(t, clock) - p.before)
			if c.away && owes < maxFailover {
				t.Errorf("the guest owes only %d ns", owes)
			}
			pauses := 0
			for s := statusOf(t, b.pid); pauses < 10 || s.Follow == nil || s.Follow.Debt != 0; s = statusOf(t, b.pid) {
				if pauses++; pauses > 400 {
					t.Fatalf("the guest doesn't come to its reference: %+v", s.Follow)
				}
				time.Sleep(200 * time.Millisecond)
				b.pause(t, 25*time.Millisecond)
			}
			off := offset(t, clock) - p.before - want()
			s := statusOf(t, b.pid)
			t.Logf("the guest was %d ns ahead of where it should be, and is %d behind of it after %d pauses: %+v", owes, off, pauses, s.Follow)
			check.Within(t, off, maxFailover, "the guest is behind of where it should be")
			if s.Follow.GivenUp != 0 || s.Follow.Bases != 1 || s.Reanchored != 0 || s.Passed != 0 {
				t.Errorf("status: %+v, %+v", withoutRecords(s), s.Follow)
			}
			domaintest.NoBacksteps(t, clock)
		})
	}
}

// primary is what is left of one.
type primary struct {
	state         string          // a checkpoint
	export        string          // the anchor that it handed over before that
	anchor        metadata.Anchor // the same
	before        int64           // its guest's offset, ns
	lead          int64           // what its TSC was ahead of its clock by, ns
	stop, stopped int64           // CLOCK_MONOTONIC_RAW before and after the checkpoint's stop, ns
}

// primaryDies has a guest run in a QEMU that is killed some time after a checkpoint.
func primaryDies(t *testing.T) (p primary) {
	t.Helper()
	const age = 300 * time.Millisecond
	p.state = t.TempDir() + "/checkpoint"
	qemu, monitor := bareQEMU(t, "primary")
	clock := domaintest.ClockOfProcess(t, qemu.Process.Pid)
	pid := strconv.Itoa(qemu.Process.Pid)
	ftclock(t, "attach", pid)
	for range 5 {
		check.NoError(t, monitor.Pause(5*time.Millisecond))
	}
	p.before = offset(t, clock)
	p.export = ftclock(t, "anchor", "export", pid)
	check.NoError(t, json.Unmarshal([]byte(p.export), &p.anchor))
	p.lead = tscLead(t, clock, p.anchor.KHz)
	p.stop = guest.Raw()
	execute(t, monitor, "stop", nil)
	p.stopped = guest.Raw()
	execute(t, monitor, "migrate", map[string]any{"uri": "exec:cat >" + p.state})
	awaitMigration(t, monitor, "completed")
	execute(t, monitor, "cont", nil)
	time.Sleep(age)
	check.NoError(t, qemu.Process.Kill())
	_ = qemu.Wait()
	return p
}

// backup is a QEMU that has loaded a primary's checkpoint.
type backup struct {
	qemu    *exec.Cmd
	pid     string
	monitor *qmp.Conn
}

// backup loads the checkpoint, and doesn't let its guest run yet. Options are those of ftclock attach.
func (p primary) backup(t *testing.T, options ...string) (b backup) {
	t.Helper()
	b.qemu, b.monitor = bareQEMU(t, "backup", "-S", "-incoming", "exec:cat "+p.state)
	b.pid = strconv.Itoa(b.qemu.Process.Pid)
	ftclock(t, append([]string{"attach", b.pid}, options...)...)
	awaitMigration(t, b.monitor, "completed")
	return b
}

// pause makes a checkpoint of that length.
func (b backup) pause(t *testing.T, length time.Duration) {
	t.Helper()
	check.NoError(t, b.monitor.Pause(length))
}

// ofSynchronisation is what has to be said of two hosts' clocks where a guest goes on by them; "" if nothing has.
func ofSynchronisation(a metadata.Anchor, boot string) string {
	switch here := !unsynchronised(); {
	case boot == "" || here && a.Synchronised:
		return ""
	case here:
		return "the clock of the host that it comes from isn't synchronised"
	case a.Synchronised:
		return "this host's clock isn't synchronised"
	}
	return "neither host's clock is synchronised"
}
