package record

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
)

const testUUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

// page is a module's ring as far as a writer sees it.
type page struct {
	newest  uint64
	records map[uint64]clockpage.Record
	errs    map[uint64]error
}

func (p *page) Counts() clockpage.Counts { return clockpage.Counts{Pauses: p.newest} }

func (p *page) Record(n uint64) (clockpage.Record, error) {
	if err := p.errs[n]; err != nil {
		return clockpage.Record{}, err
	}
	if n+clockpage.RingLen <= p.newest {
		return clockpage.Record{}, clockpage.ErrStale
	}
	r, ok := p.records[n]
	if !ok {
		return r, clockpage.ErrNotYet
	}
	return r, nil
}

// bench is a writer with a clock of its own and a page.
type bench struct {
	t     *testing.T
	dir   string
	at    time.Time
	page  *page
	lost  uint64
	seen  []error
	conf  Config
	write *Writer
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, dir: t.TempDir(), at: time.Date(2026, 3, 4, 5, 6, 0, 0, time.UTC), page: &page{records: map[uint64]clockpage.Record{}}}
	b.conf = Config{Dir: b.dir, UUID: testUUID, Name: "web1", Shim: "test", Run: "boot-1-1", Worker: 1,
		Problem: func(err error) { b.seen = append(b.seen, err) }, Now: func() time.Time { return b.at },
		HostClock: func() (control.HostClock, error) {
			return control.HostClock{Samples: 1, Synchronised: true, Offset: 5, EstimatedError: 7, MaximumError: 9}, nil
		}}
	b.begin()
	return b
}

func (b *bench) begin() {
	b.write = NewWriter(b.conf)
	b.write.SetState(control.Correcting, "", "raw", 0)
}

// pauses lets the guest be paused, every step once.
func (b *bench) pauses(n int, step time.Duration) {
	for range n {
		b.at = b.at.Add(step)
		p := b.page
		p.newest++
		r := clockpage.Record{Number: p.newest, Saved: 1, WentOn: 1, StopRaw: 1, ContRaw: 2, StopReal: uint64(b.at.UnixNano()) - 5e6,
			ContReal: uint64(b.at.UnixNano()), Lost: 5_000_000 + int64(p.newest%1000), ResidualStop: int64(p.newest%300) - 100,
			ResidualCont: 3, Cost: 900 + p.newest%50, Outcome: clockpage.Outcome{Decision: clockpage.Dropped, Reason: clockpage.InTolerance, Event: clockpage.Checkpoint},
			Ordered: 1, Error: 12_345, Slept: 77}
		p.records[p.newest] = r
		delete(p.records, p.newest-2*clockpage.RingLen)
		b.lost += r.Took()
	}
}

func (b *bench) read() *Record {
	b.t.Helper()
	r := check.Value(Read(b.dir, testUUID, time.Time{}, time.Time{}))(b.t)
	return r
}

// accounted checks that each pause is in the record once, or is missed.
func (b *bench) accounted(r *Record) {
	b.t.Helper()
	next := map[string]uint64{}
	for _, m := range r.Minutes {
		n := m.Pauses
		for _, x := range m.Missed {
			n += x.Count
		}
		if n != m.Last-m.First+1 {
			b.t.Errorf("minute %v has %d pauses for the numbers %d to %d", m.Start, n, m.First, m.Last)
		}
		if want := next[m.Run] + 1; next[m.Run] != 0 && m.First != want {
			b.t.Errorf("minute %v begins with %d, want %d", m.Start, m.First, want)
		}
		next[m.Run] = m.Last
		if m.Residual.Count != m.Pauses || m.Cost.Count != m.Pauses {
			b.t.Errorf("minute %v has %d residuals and %d costs for %d pauses", m.Start, m.Residual.Count, m.Cost.Count, m.Pauses)
		}
	}
}

func gaps(r *Record, kind GapKind) (all []Gap) {
	for _, g := range r.Gaps {
		if g.Kind == kind {
			all = append(all, g)
		}
	}
	return all
}

func TestMinutes(t *testing.T) {
	b := newBench(t)
	for range 300 { // five minutes, 20 pauses a second
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	r := b.read()
	b.accounted(r)
	total := r.Total()
	if total.Pauses != 6000 || total.Lost != b.lost || total.CaughtUp != b.lost || total.Held+total.Passed != 0 {
		t.Errorf("%d pauses, %d ns lost, %d caught up; want 6000 and %d", total.Pauses, total.Lost, total.CaughtUp, b.lost)
	}
	if len(r.Minutes) != 6 || !r.Minutes[0].Start.Equal(time.Date(2026, 3, 4, 5, 6, 0, 0, time.UTC)) || r.Minutes[1].Pauses != 1200 {
		t.Errorf("%d minutes from %v", len(r.Minutes), r.Minutes[0].Start)
	}
	d := total.Residual
	if d.Min != -100 || d.Max != 199 || abs(d.Median()-50) > 2 || d.Worst() != 199 || abs(d.P99()-197) > 2 {
		t.Errorf("residuals: min %d, median %d, max %d, p99 %d", d.Min, d.Median(), d.Max, d.P99())
	}
	if total.Cost.Min != 900 || total.Cost.Max != 949 {
		t.Errorf("cost: %d to %d", total.Cost.Min, total.Cost.Max)
	}
	if h := total.Host; !h.Synchronised || h.Offset != 5 || h.EstimatedError != 7 || h.MaximumError != 9 || h.Samples < 300 {
		t.Errorf("host clock: %+v", h)
	}
	want := []Decision{{clockpage.Outcome{Decision: clockpage.Dropped, Reason: clockpage.InTolerance, Event: clockpage.Checkpoint}, 6000, b.lost}}
	if !reflect.DeepEqual(total.Decisions, want) {
		t.Errorf("decisions: %+v", total.Decisions)
	}
	if len(r.Gaps) != 0 || len(r.Problems) != 0 || len(r.Spans) != 1 || r.Spans[0].State != control.Correcting || !r.Spans[0].To.IsZero() {
		t.Errorf("gaps %+v, problems %v, spans %+v", r.Gaps, r.Problems, r.Spans)
	}
	all, problems, err := Pauses(b.dir, testUUID, time.Time{}, time.Time{})
	if err != nil || len(problems) > 0 || len(all) != 6000 {
		t.Fatalf("%d pauses, %v, %v", len(all), problems, err)
	}
	if want := b.page.records[5999]; !reflect.DeepEqual(all[5998].Record, want) {
		t.Errorf("pause 5999: %+v, want %+v", all[5998], want)
	}
}

// A minute is written down when it is over, though no other pause comes.
func TestAMinuteIsWrittenDownWhenItIsOver(t *testing.T) {
	b := newBench(t)
	if left := b.write.SettleMinute(); left != 0 {
		t.Errorf("without a pause: %v", left)
	}
	b.pauses(3, time.Second)
	b.write.Collect(b.page)
	if left := b.write.SettleMinute(); left != 57*time.Second {
		t.Errorf("%v are left", left)
	}
	closed := func() bool {
		text, _ := os.ReadFile(filepath.Join(Path(b.dir, testUUID), timeline+"-000001"+suffix))
		return strings.Contains(string(text), kindMinute)
	}
	if closed() {
		t.Error("written down before it is over")
	}
	b.at = b.at.Add(58 * time.Second)
	if left := b.write.SettleMinute(); left != 0 || !closed() {
		t.Errorf("%v are left, written down: %v", left, closed())
	}
	b.pauses(2, time.Second)
	b.write.Collect(b.page)
	if r := b.read(); len(r.Minutes) != 2 || r.Total().Pauses != 5 {
		t.Errorf("%d minutes, %d pauses", len(r.Minutes), r.Total().Pauses)
	} else {
		b.accounted(r)
	}
}

// A worker may be killed between any two system calls: the files are then what they were after one of its Collects, with or
// without its last write. The next worker goes on, and nothing is counted twice.
func TestKilledAtAnyMoment(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	b := newBench(t)
	kills := 0
	for range 150 {
		b.pauses(1+random.IntN(60), time.Duration(20+random.IntN(400))*time.Millisecond)
		before := snapshot(t, b.dir)
		b.write.Collect(b.page)
		if random.IntN(3) == 0 {
			kills++
			undoSome(t, b.dir, before, random)
			b.conf.Worker++
			b.begin()
		}
	}
	b.write.Collect(b.page)
	r := b.read()
	b.accounted(r)
	if total := r.Total(); total.Pauses != b.page.newest || total.Lost != b.lost || len(total.Missed) != 0 || len(r.Gaps) != 0 {
		t.Errorf("%d of %d pauses, %d of %d ns, gaps %+v after %d kills", total.Pauses, b.page.newest, total.Lost, b.lost, r.Gaps, kills)
	}
	all, _, err := Pauses(b.dir, testUUID, time.Time{}, time.Time{})
	if err != nil || uint64(len(all)) != b.page.newest {
		t.Errorf("%d of %d pauses one by one: %v", len(all), b.page.newest, err)
	}
}

func snapshot(t *testing.T, dir string) map[string]string {
	files := map[string]string{}
	names, _ := filepath.Glob(filepath.Join(Path(dir, testUUID), "*"))
	for _, name := range names {
		text := check.Value(os.ReadFile(name))(t)
		files[name] = string(text)
	}
	return files
}

// undoSome takes back what a Collect that is killed half-way doesn't get to: it writes the pauses, then the
// timeline, then the open minute.
func undoSome(t *testing.T, dir string, before map[string]string, random *rand.Rand) {
	after := snapshot(t, dir)
	order := []string{open, timeline, pauses}
	for _, kind := range order[:random.IntN(len(order)+1)] {
		for name := range after {
			if !strings.HasPrefix(filepath.Base(name), kind) {
				continue
			}
			var err error
			if text, was := before[name]; was {
				err = os.WriteFile(name, []byte(text), 0o600)
			} else {
				err = os.Remove(name)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Any damage to any file is told of, and everything else is still read.
func TestDamage(t *testing.T) {
	b := newBench(t)
	for range 200 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	name := filepath.Join(Path(b.dir, testUUID), segmentName(timeline, 1))
	whole := check.Value(os.ReadFile(name))(t)
	minutes := len(b.read().Minutes)
	for at := range whole {
		if at%97 != 0 && at != len(whole)-1 {
			continue
		}
		broken := append([]byte(nil), whole...)
		broken[at] ^= 1
		check.NoError(t, os.WriteFile(name, broken, 0o600))
		r := b.read()
		if len(r.Problems) != 1 && len(r.Problems) != 2 || len(gaps(r, Damage)) == 0 || len(r.Minutes) < minutes-2 {
			t.Fatalf("byte %d changed: problems %v, gaps %+v, %d minutes of %d", at, r.Problems, r.Gaps, len(r.Minutes), minutes)
		}
		if !strings.Contains(r.Problems[0].String(), "left out") || !strings.Contains(r.Problems[0].String(), name) {
			t.Fatal(r.Problems[0])
		}
	}
	for size := range whole {
		if size%23 != 0 {
			continue
		}
		check.NoError(t, os.WriteFile(name, whole[:size], 0o600))
		r := b.read()
		if whole[max(size-1, 0)] != '\n' && len(r.Problems) == 0 {
			t.Fatalf("cut after %d bytes, and nothing is said", size)
		}
	}
	// The next worker goes on behind a torn tail without harming it.
	torn := whole[:len(whole)-9]
	check.NoError(t, os.WriteFile(name, torn, 0o600))
	b.conf.Worker++
	b.begin()
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	b.write.End(EndRequest)
	r := b.read()
	if len(r.Problems) != 1 || !strings.Contains(r.Problems[0].What, "1 damaged from line") {
		t.Errorf("problems: %v", r.Problems)
	}
	now, err := os.ReadFile(name)
	if err != nil || !strings.HasPrefix(string(now), string(torn)) {
		t.Errorf("the torn file was changed: %v", err)
	}
	if g := gaps(r, Damage); g[len(g)-1].Pauses != 1200 { // the minute that the tail was
		t.Errorf("gaps: %+v", g)
	}
	if r.Minutes[len(r.Minutes)-1].Last != b.page.newest {
		t.Errorf("the last minute ends with pause %d of %d", r.Minutes[len(r.Minutes)-1].Last, b.page.newest)
	}
}

// A newer version's files stay as they are, are named, and new ones are put beside them.
func TestNewerVersion(t *testing.T) {
	b := newBench(t)
	path := Path(b.dir, testUUID)
	check.NoError(t, os.RemoveAll(path))
	check.NoError(t, os.MkdirAll(path, 0o700))
	newer := map[string]string{}
	for name, kind := range map[string]string{segmentName(timeline, 4): timeline, segmentName(pauses, 9): pauses, open + suffix: open} {
		text := string(appendEntry(nil, head{kindHead, formatName, Version + 1, kind, testUUID})) + "what we can't know\x00"
		newer[filepath.Join(path, name)] = text
		check.NoError(t, os.WriteFile(filepath.Join(path, name), []byte(text), 0o600))
	}
	b.conf.maxTimeline, b.conf.segment = 6<<10, 2<<10
	b.begin()
	for range 300 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	for name, text := range newer {
		got, err := os.ReadFile(name)
		if filepath.Base(name) == open+suffix {
			got, err = os.ReadFile(name + ".newer-1")
		}
		if err != nil || string(got) != text {
			t.Errorf("%s: %v; it is %q", name, err, got)
		}
	}
	r := b.read()
	if g := gaps(r, Newer); len(g) != 2 || !strings.Contains(g[0].Why, "newer version") || len(r.Minutes) == 0 {
		t.Errorf("gaps: %+v, %d minutes", r.Gaps, len(r.Minutes))
	}
	_, problems, err := Pauses(b.dir, testUUID, time.Time{}, time.Time{})
	if err != nil || len(problems) != 1 {
		t.Errorf("pauses: %v, %v", problems, err)
	}
}

func TestBound(t *testing.T) {
	b := newBench(t)
	b.conf.maxTimeline, b.conf.segment = 16<<10, 4<<10
	b.begin()
	for range 600 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
		var total int64
		names, _ := filepath.Glob(filepath.Join(Path(b.dir, testUUID), "*"))
		for _, name := range names {
			if info, err := os.Stat(name); err == nil && !strings.HasPrefix(filepath.Base(name), open) {
				total += info.Size()
			}
		}
		if total > (16+8)<<10 {
			t.Fatalf("%d bytes: %v", total, names)
		}
	}
	r := b.read()
	b.accounted(r)
	if len(r.Gaps) != 0 || len(r.Problems) != 0 || len(r.Minutes) < 5 || r.Minutes[0].First == 1 || r.Minutes[len(r.Minutes)-1].Last != b.page.newest {
		t.Errorf("gaps %+v, problems %v, %d minutes", r.Gaps, r.Problems, len(r.Minutes))
	}
	// A worker that takes over knows the state though the file that said it first is gone.
	if len(r.Spans) != 1 || r.Spans[0].State != control.Correcting {
		t.Errorf("spans: %+v", r.Spans)
	}
}

// Where the domain's directory can't be made, that is what is told, once.
func TestNoDirectory(t *testing.T) {
	b := newBench(t)
	check.NoError(t, os.RemoveAll(b.dir))
	if err := os.WriteFile(b.dir, nil, 0o600); err != nil { // not a directory
		t.Fatal(err)
	}
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	if s := b.write.Status(); !strings.Contains(s.Problem, "mkdir ") || len(b.seen) != 1 {
		t.Errorf("status %+v, problems %v", s, b.seen)
	}
}

// A disk that takes nothing costs what it would have held, and no more: told once, and as missed pauses.
func TestNoDisk(t *testing.T) {
	b := newBench(t)
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	aside := b.dir + ".aside"
	check.NoError(t, os.Rename(b.dir, aside))
	if err := os.WriteFile(b.dir, nil, 0o600); err != nil { // not a directory
		t.Fatal(err)
	}
	for range 180 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	if s := b.write.Status(); !strings.Contains(s.Problem, "not a directory") || len(b.seen) != 1 {
		t.Errorf("status %+v, problems %v", s, b.seen)
	}
	check.NoError(t, errors.Join(os.Remove(b.dir), os.Rename(aside, b.dir)))
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	b.write.End(EndRequest)
	if s := b.write.Status(); s.Problem != "" {
		t.Errorf("status %+v", s)
	}
	r := b.read()
	b.accounted(r)
	g := gaps(r, NotKept)
	if len(g) != 1 || !strings.Contains(g[0].Why, string(Unwritten)) || g[0].Pauses == 0 {
		t.Errorf("gaps: %+v", g)
	}
	if total := r.Total(); total.Pauses+g[0].Pauses != b.page.newest {
		t.Errorf("%d pauses and %d missed of %d", total.Pauses, g[0].Pauses, b.page.newest)
	}
}

func TestReadRefuses(t *testing.T) {
	if _, err := Read(t.TempDir(), testUUID, time.Time{}, time.Time{}); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
	dir := t.TempDir()
	check.NoError(t, os.MkdirAll(Path(dir, testUUID), 0o700))
	if _, err := Read(dir, testUUID, time.Time{}, time.Time{}); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
	if all, err := Domains(dir); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
	if all, err := Domains(filepath.Join(dir, "nowhere")); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
}

func TestSinceAndUntil(t *testing.T) {
	b := newBench(t)
	for range 60 {
		b.pauses(10, time.Second)
		b.write.Collect(b.page)
	}
	from := time.Date(2026, 3, 4, 5, 8, 30, 0, time.UTC)
	r, err := Read(b.dir, testUUID, from, from.Add(2*time.Minute))
	if err != nil || len(r.Minutes) != 3 || len(r.Spans) != 1 {
		t.Fatalf("%v: %d minutes, spans %+v", err, len(r.Minutes), r.Spans)
	}
	all, _, err := Pauses(b.dir, testUUID, from, from.Add(2*time.Minute))
	if err != nil || len(all) != 120 {
		t.Errorf("%d pauses: %v", len(all), err)
	}
}

func TestDistribution(t *testing.T) {
	h := newHistogram()
	if d := h.distribution(); d.Quantile(0.5) != 0 || d.P99() != 0 {
		t.Error(d)
	}
	for v := int64(-1000); v <= 100_000; v++ {
		h.add(v, 1)
	}
	h.add(int64(time.Hour), 1)
	d := h.distribution()
	if d.Min != -1000 || d.Max != int64(time.Hour) || d.Count != 101_002 {
		t.Errorf("%+v", d)
	}
	for _, q := range []float64{0, 0.001, 0.25, 0.5, 0.99, 0.999} {
		want := -1000 + q*float64(d.Count)
		if got := float64(d.Quantile(q)); got-want > 0.01*abs64(want)+2 || want-got > 0.01*abs64(want)+2 {
			t.Errorf("quantile %g: %g, want %g", q, got, want)
		}
	}
	text := check.Value(d.MarshalJSON())(t)
	var back Distribution
	if err := back.UnmarshalJSON(text); err != nil || !reflect.DeepEqual(back, d) {
		t.Error(err)
	}
	again := newHistogram()
	again.restore(back)
	if got := again.distribution(); !reflect.DeepEqual(got, d) {
		t.Error("restored, it is another one")
	}
	twice := d.Merge(d)
	if twice.Count != 2*d.Count || twice.Median() != d.Median() || twice.Sum != 2*d.Sum {
		t.Errorf("%d values, median %d", twice.Count, twice.Median())
	}
}

func abs64(v float64) float64 {
	if v < 0 {
		return -v
	}
	return v
}

func TestRun(t *testing.T) {
	own := Run(os.Getpid())
	if own != Run(os.Getpid()) || own == Run(1) || strings.HasSuffix(own, "-0") || !strings.Contains(own, fmt.Sprintf("-%d-", os.Getpid())) {
		t.Errorf("%q, %q", own, Run(1))
	}
}

func FuzzScan(f *testing.F) {
	b := appendEntry(nil, head{kindHead, formatName, Version, timeline, testUUID})
	b = appendEntry(b, begin{Kind: kindBegin, Run: "r"})
	b = appendEntry(b, minuteEntry{kindMinute, &Minute{Run: "r", First: 1, Last: 2, Pauses: 2}})
	f.Add(b)
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		// The checksum would keep nearly all inputs out: lines get a right one.
		var lines []byte
		for line := range strings.SplitSeq(string(text), "\n") {
			lines = append(lines, line...)
			lines = append(lines, '\n')
			if len(line) > 9 {
				lines = appendLine(lines, []byte(line[9:]))
			}
		}
		check.NoError(t, os.MkdirAll(Path(dir, testUUID), 0o700))
		for _, name := range []string{segmentName(timeline, 1), segmentName(pauses, 1), open + suffix} {
			check.NoError(t, os.WriteFile(filepath.Join(Path(dir, testUUID), name), lines, 0o600))
		}
		if r, err := Read(dir, testUUID, time.Time{}, time.Time{}); err == nil {
			_ = r.Total()
		}
		_, _, _ = Pauses(dir, testUUID, time.Time{}, time.Time{})
		_ = NewWriter(Config{Dir: dir, UUID: testUUID, Run: "r"}).Status()
	})
}
