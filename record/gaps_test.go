package record

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

func TestGapsOfTheRing(t *testing.T) {
	b := newBench(t)
	b.pauses(10, 50*time.Millisecond)
	b.write.Collect(b.page)
	before := b.at
	b.pauses(1000, 50*time.Millisecond)
	b.write.Collect(b.page)
	b.page.errs = map[uint64]error{1015: clockpage.ErrTorn}
	b.pauses(10, 50*time.Millisecond)
	broken := b.page.records[1018]
	broken.Lost = -7
	b.page.records[1018] = broken
	b.write.Collect(b.page)
	r := b.read()
	b.accounted(r)
	total := r.Total()
	if total.Pauses != 1020-744-2 || total.MissedInRun != 746 {
		t.Errorf("%d pauses, %d missed", total.Pauses, total.MissedInRun)
	}
	g := gaps(r, NotKept)
	if len(g) != 3 || g[0].Pauses != 744 || !g[0].From.Equal(before) || !g[0].To.Equal(before.Add(745*50*time.Millisecond)) ||
		!strings.Contains(g[0].Why, "overwritten") || g[1].Pauses != 1 || g[2].Pauses != 1 || !strings.Contains(g[2].Why, "unreadable") {
		t.Errorf("gaps: %+v", g)
	}
	if s := b.write.Status(); s.Pauses != total.Pauses || s.Missed != 746 {
		t.Errorf("status: %+v", s)
	}
}

// A state that was loaded into a new QEMU is no pause of that one's, and what its guest was away counts as what a pause takes.
func TestStatesThatAreLoaded(t *testing.T) {
	b := newBench(t)
	for i, outcome := range []clockpage.Outcome{
		{Decision: clockpage.Anchored, Reason: clockpage.FromImport, Event: clockpage.Restore},
		{Decision: clockpage.Held, Reason: clockpage.OverLimit, Event: clockpage.Migrate},
		{Decision: clockpage.Passed, Reason: clockpage.First, Event: clockpage.Start},
	} {
		b.page.newest++
		b.page.records[b.page.newest] = clockpage.Record{Number: b.page.newest, Saved: 1, WentOn: 1, ContRaw: 2, ContReal: uint64(b.at.UnixNano()),
			Lost: int64([]time.Duration{20 * time.Second, time.Hour, 0}[i]), ResidualStop: 1e6, Outcome: outcome}
	}
	b.write.Collect(b.page)
	total := b.read().Total()
	if total.CaughtUp != uint64(20*time.Second) || total.Held != uint64(time.Hour) || total.Lost != total.CaughtUp+total.Held || total.Residual.Count != 0 {
		t.Errorf("%d ns lost, %d caught up, %d held; residuals %+v", total.Lost, total.CaughtUp, total.Held, total.Residual)
	}
}

// A hostile page costs bounded work, and doesn't spoil what was there.
func TestHostilePage(t *testing.T) {
	b := newBench(t)
	b.pauses(10, time.Second)
	b.write.Collect(b.page)
	good := *b.page
	for _, newest := range []uint64{1 << 63, 1<<64 - 1, 1 << 59, 0, 3} {
		b.page = &page{newest: newest, records: map[uint64]clockpage.Record{}}
		b.write.Collect(b.page)
		b.at = b.at.Add(time.Second)
	}
	b.page = &good
	b.write.Collect(b.page)
	r := b.read()
	if r.Minutes[0].Pauses != 10 || r.Minutes[0].First != 1 {
		t.Errorf("the first minute: %+v", r.Minutes[0])
	}
	if len(gaps(r, NotKept)) == 0 || len(gaps(r, Down)) == 0 {
		t.Errorf("gaps: %+v", r.Gaps)
	}
	for _, name := range []string{timeline + "-000001" + suffix} {
		info, err := os.Stat(filepath.Join(Path(b.dir, testUUID), name))
		if err != nil || info.Size() > 16<<10 {
			t.Errorf("%s: %v, %v", name, info.Size(), err)
		}
	}
}

// That the guest reads another clock is found out late, and holds for the time before.
func TestUnkept(t *testing.T) {
	for name, c := range map[string]struct {
		without time.Duration
		from    time.Duration // since the begin
	}{"for a part": {4 * time.Minute, 6 * time.Minute}, "since the begin": {time.Hour, 0}} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			begin := b.at
			b.pauses(10, time.Minute)
			b.write.Collect(b.page)
			b.write.SetState(control.Unkept, "", "raw", c.without)
			b.pauses(1, time.Second)
			b.write.Collect(b.page)
			b.write.End(EndQEMU)
			r := b.read()
			if n := len(r.Spans); n != 2 || r.Spans[1].State != control.Unkept || !r.Spans[1].From.Equal(begin.Add(c.from)) || !r.Spans[0].To.Equal(r.Spans[1].From) {
				t.Errorf("spans: %+v", r.Spans)
			}
			if len(r.Gaps) != 1 || r.Gaps[0].Kind != Uncorrected || !r.Gaps[0].From.Equal(begin.Add(c.from)) || !strings.Contains(r.Gaps[0].Why, "no clock that ftclock keeps") {
				t.Errorf("gaps: %+v", r.Gaps)
			}
		})
	}
}

func TestStatesAndEnds(t *testing.T) {
	b := newBench(t)
	b.pauses(10, time.Second)
	b.write.Collect(b.page)
	b.at = b.at.Add(time.Second)
	off := b.at
	b.write.SetState(control.Watching, "", "", 0)
	b.at = b.at.Add(time.Minute)
	on := b.at
	b.write.SetState(control.Correcting, "", "utc", 0)
	b.pauses(10, time.Second)
	b.write.Collect(b.page)
	b.write.End(EndRequest)
	down := b.at
	b.pauses(5, time.Second)
	b.at = b.at.Add(time.Hour)
	b.begin() // the same QEMU again
	up := b.at
	b.write.Collect(b.page)
	b.write.End(EndQEMU)
	b.at = b.at.Add(time.Hour)
	b.conf.Run = "boot-2-2"
	b.page = &page{records: map[uint64]clockpage.Record{}}
	b.begin()
	b.pauses(5, time.Second)
	b.write.Collect(b.page)
	lastSign := b.at
	b.at = b.at.Add(time.Hour)
	b.conf.Run = "boot-3-3" // without an end: the host went down
	b.page = &page{records: map[uint64]clockpage.Record{}}
	b.begin()
	r := b.read()
	b.accounted(r)
	if g := gaps(r, Uncorrected); len(g) != 1 || !g[0].From.Equal(off) || !g[0].To.Equal(on) {
		t.Errorf("uncorrected: %+v", g)
	}
	g := gaps(r, Down)
	if len(g) != 2 || !g[0].From.Equal(down) || !g[0].To.Equal(up) || !g[1].From.Equal(lastSign) || !strings.Contains(g[1].Why, "host went down") {
		t.Errorf("down: %+v", g)
	}
	if total := r.Total(); total.Pauses != 30 {
		t.Errorf("%d pauses", total.Pauses)
	}
	if n := len(r.Spans); n != 6 || r.Spans[1].State != control.Watching || !r.Spans[n-2].To.Equal(lastSign) || !r.Spans[n-1].To.IsZero() {
		t.Errorf("spans: %+v", r.Spans)
	}
}

func TestUncorrectedPausesAreGaps(t *testing.T) {
	b := newBench(t)
	b.pauses(3, time.Second)
	r := b.page.records[2]
	r.Decision, r.Reason = clockpage.Passed, clockpage.ReadFailed
	b.page.records[2] = r
	b.write.Collect(b.page)
	g := gaps(b.read(), Uncorrected)
	if len(g) != 1 || g[0].Pauses != 1 || g[0].Why != clockpage.ReadFailed.String() {
		t.Errorf("gaps: %+v", g)
	}
}
