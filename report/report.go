package report

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"ftclock/control"
	"ftclock/host"
	"ftclock/record"
)

// Report is what is known of a domain's clock from From to To. Durations and residuals are ns.
type Report struct {
	Made    time.Time `json:"made"`
	Version string    `json:"version"` // of ftclock, which made it
	Host    string    `json:"host"`
	Name    string    `json:"name"`
	UUID    string    `json:"uuid"`
	// From and To are whole minutes, but for a To that is the moment of the report.
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
	// Begin is the oldest entry on disk.
	Begin     time.Time       `json:"record_begins"`
	Statement Statement       `json:"statement"`
	Stretches []Stretch       `json:"stretches"`
	Gaps      []Gap           `json:"gaps"`
	Minutes   []record.Minute `json:"minutes"`
	Problems  []string        `json:"problems"`
}

// Kind is what is known of a stretch of time.
type Kind string

// The values of Kind, the one that prevails last.
const (
	Off         Kind = "off"         // no QEMU of the domain ran: there was no clock
	Corrected   Kind = "corrected"   // it is recorded that every pause was treated as the policy says
	Uncorrected Kind = "uncorrected" // it is recorded that the clock, or a pause, wasn't
	Unknown     Kind = "not known"
)

// Stretch is a time of one Kind. A report's stretches follow each other without a hole.
type Stretch struct {
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
	Kind Kind      `json:"kind"`
}

// Gap is record.Gap within the report's time: an unknown end is put where it can be at most.
type Gap struct {
	From   time.Time `json:"from"`
	To     time.Time `json:"to"`
	Kind   string    `json:"kind"` // record.GapKind
	Pauses uint64    `json:"pauses"`
	Why    string    `json:"why"`
}

// Statement is what article 4 of Commission Delegated Regulation (EU) 2017/574 (RTS 25) asks a user of a business clock to be able
// to show.
type Statement struct {
	// Reference is what the clock was compared with: "raw" (the host's CLOCK_MONOTONIC_RAW), "utc" (its CLOCK_REALTIME), "both",
	// or "none".
	Reference string `json:"reference"`
	Pauses    uint64 `json:"pauses"`
	Missed    uint64 `json:"missed"` // pauses that are known by their number alone
	Doubtful  uint64 `json:"doubtful"`
	Lost      uint64 `json:"lost_ns"` // what stock QEMU would have taken from the clock
	CaughtUp  uint64 `json:"caught_up_ns"`
	Held      uint64 `json:"held_ns"`
	Passed    uint64 `json:"passed_ns"`

	// Divergence is the largest distance from the reference at any recorded pause, and WorstAt the minute in which it was. What the clock
	// was left behind moves the reference, and is Behind.
	Divergence int64     `json:"largest_recorded_divergence_ns"`
	WorstAt    time.Time `json:"largest_recorded_divergence_in"`
	Median     int64     `json:"median_ns"`
	P99        int64     `json:"p99_ns"`
	// Behind is Held and Passed: by so much the guest's clock was left behind, unless somebody in the guest set it.
	Behind uint64 `json:"left_behind_ns"`

	Corrected   time.Duration `json:"corrected_ns"`
	Uncorrected time.Duration `json:"uncorrected_ns"`
	Unknown     time.Duration `json:"not_known_ns"`
	Off         time.Duration `json:"off_ns"`
	// Coverage is Corrected as a part of all but Off, 0 to 1; 0 where there is nothing but Off.
	Coverage float64 `json:"coverage"`

	HostClock Host `json:"host_clock"`
	// ToUTC bounds the distance from UTC: Divergence and the host's maximum error. -1 where the record can't say it, and ToUTCWhy
	// says why.
	ToUTC    int64  `json:"largest_divergence_from_utc_ns"`
	ToUTCWhy string `json:"why_not_from_utc,omitempty"`
	// Findings is what keeps the period from being shown to be right, in words. None: it is.
	Findings []string `json:"findings"`
}

// Host is the host's CLOCK_REALTIME over the minutes with pauses.
type Host struct {
	Minutes        int   `json:"minutes"` // of which something is known
	Unknown        int   `json:"minutes_not_known"`
	Unsynchronised int   `json:"minutes_not_synchronised"`
	Offset         int64 `json:"worst_offset_ns"`
	EstimatedError int64 `json:"worst_estimated_error_ns"`
	MaximumError   int64 `json:"worst_maximum_error_ns"`
}

// Options are what a record doesn't say.
type Options struct {
	From, To time.Time // zero From: where the record begins
	Made     time.Time
	Version  string
	Host     string
	// Alive says that the domain's shim answers now. If it doesn't, and the record has no end, nothing is known of the time
	// after the record's last entry.
	Alive bool
}

// New makes a report. r must have been read with the same bounds, From rounded down to the minute.
func New(r *record.Record, o Options) *Report {
	p := &Report{Made: o.Made.UTC(), Version: o.Version, Host: o.Host, Name: r.Name, UUID: r.UUID, Begin: r.Begin,
		From: cmp.Or(o.From, r.Begin).UTC().Truncate(time.Minute), To: o.To.UTC(), Minutes: r.Minutes, Problems: []string{}, Gaps: []Gap{}}
	if p.Minutes == nil {
		p.Minutes = []record.Minute{}
	}
	for _, problem := range r.Problems {
		p.Problems = append(p.Problems, problem.String())
	}
	p.stretch(r, o)
	p.state()
	return p
}

// layer is a time and what is said of it; a later layer covers earlier ones.
type layer struct {
	from, to time.Time
	kind     Kind
}

// stretch cuts the time.
func (p *Report) stretch(r *record.Record, o Options) {
	var layers []layer
	gaps := slices.Clone(r.Gaps)
	for i, s := range r.Spans {
		to, kind := s.To, Corrected
		switch s.State {
		case control.Correcting:
		case control.Starting:
			kind = Unknown
		default:
			kind = Uncorrected
		}
		if to.IsZero() {
			to = p.To
			if i == len(r.Spans)-1 && !o.Alive && r.Seen.Before(p.To) {
				to = r.Seen
				gaps = append(gaps, record.Gap{Kind: record.Down, From: r.Seen, Why: "the shim doesn't live any more and wrote no end: it was killed, or the host went down"})
			}
		}
		layers = append(layers, layer{s.From, to, kind})
	}
	if p.From.Before(r.Begin.Truncate(time.Minute)) {
		gaps = append(gaps, record.Gap{Kind: "before the record", From: p.From, To: r.Begin, Why: "the record on disk begins later"})
	}
	for _, pass := range []Kind{Uncorrected, Unknown} {
		for _, g := range gaps {
			kind := Unknown
			if g.Kind == record.Uncorrected {
				kind = Uncorrected
			}
			if kind == pass {
				from, to := p.reach(r, g)
				layers = append(layers, layer{from, to, kind})
			}
		}
	}
	for _, g := range gaps {
		from, to := p.reach(r, g)
		if !to.After(p.From) && !to.Equal(from) || from.After(p.To) {
			continue
		}
		p.Gaps = append(p.Gaps, Gap{From: latest(from, p.From), To: earliest(to, p.To), Kind: string(g.Kind), Pauses: g.Pauses, Why: g.Why})
	}
	slices.SortStableFunc(p.Gaps, func(a, b Gap) int { return a.From.Compare(b.From) })
	p.Stretches = flatten(layers, p.From, p.To)
}

// reach is a gap's time; an end that isn't known is where it can be at most.
func (p *Report) reach(r *record.Record, g record.Gap) (from, to time.Time) {
	from, to = g.From, g.To
	if to.IsZero() {
		to = p.To
	}
	if from.IsZero() {
		from = p.From
		for _, s := range r.Spans { // its pauses came after the beginning of their QEMU
			if !s.From.After(to) {
				from = latest(from, s.From)
			}
		}
	}
	return from.UTC(), to.UTC()
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a.UTC()
	}
	return b.UTC()
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a.UTC()
	}
	return b.UTC()
}

// flatten gives each moment the kind of the last layer that covers it, and Off where there is none.
func flatten(layers []layer, from, to time.Time) []Stretch {
	edges := []time.Time{from, to}
	for _, l := range layers {
		for _, t := range []time.Time{l.from.UTC(), l.to.UTC()} {
			if t.After(from) && t.Before(to) {
				edges = append(edges, t)
			}
		}
	}
	slices.SortFunc(edges, time.Time.Compare)
	edges = slices.CompactFunc(edges, time.Time.Equal)
	// What begins and ends at the same edges is looked at once: a month may have some thousand gaps.
	starts := make([][]int, len(edges))
	ends := make([][]int, len(edges))
	for i, l := range layers {
		a, _ := slices.BinarySearchFunc(edges, l.from.UTC(), time.Time.Compare)
		b, _ := slices.BinarySearchFunc(edges, l.to.UTC(), time.Time.Compare)
		if a < b && a < len(edges) {
			starts[a] = append(starts[a], i)
			if b < len(edges) {
				ends[b] = append(ends[b], i)
			}
		}
	}
	// Which prevails is a matter of the kind alone, as later layers are of kinds that prevail.
	rank := []Kind{Off, Corrected, Uncorrected, Unknown}
	open := map[Kind]int{Off: 1}
	all := []Stretch{}
	for i := 0; i+1 < len(edges); i++ {
		for _, l := range ends[i] {
			open[layers[l].kind]--
		}
		for _, l := range starts[i] {
			open[layers[l].kind]++
		}
		kind := Off
		for _, k := range rank {
			if open[k] > 0 {
				kind = k
			}
		}
		if n := len(all); n > 0 && all[n-1].Kind == kind {
			all[n-1].To = edges[i+1]
			continue
		}
		all = append(all, Stretch{edges[i], edges[i+1], kind})
	}
	return all
}

// state fills in the statement.
func (p *Report) state() {
	s := &p.Statement
	s.Reference = "none"
	var residual record.Distribution
	for i := range p.Minutes {
		m := &p.Minutes[i]
		s.Pauses += m.Pauses
		for _, x := range m.Missed {
			s.Missed += x.Count
		}
		s.Lost, s.CaughtUp, s.Held, s.Passed = s.Lost+m.Lost, s.CaughtUp+m.CaughtUp, s.Held+m.Held, s.Passed+m.Passed
		for _, d := range m.Decisions {
			if d.InDoubt() {
				s.Doubtful += d.Count
			}
		}
		residual = residual.Merge(m.Residual)
		if worst := m.Residual.Worst(); m.Residual.Count > 0 && (worst > s.Divergence || s.WorstAt.IsZero()) {
			s.Divergence, s.WorstAt = worst, m.Start
		}
		switch {
		case m.Reference == "" || s.Reference == m.Reference:
		case s.Reference == "none":
			s.Reference = m.Reference
		default:
			s.Reference = "both"
		}
		s.HostClock.add(m.Host)
	}
	magnitudes := residual.Magnitudes()
	s.Median, s.P99 = magnitudes.Median(), magnitudes.Quantile(0.99)
	s.Behind = s.Held + s.Passed
	for _, x := range p.Stretches {
		for kind, sum := range map[Kind]*time.Duration{Corrected: &s.Corrected, Uncorrected: &s.Uncorrected, Unknown: &s.Unknown, Off: &s.Off} {
			if kind == x.Kind {
				*sum += x.To.Sub(x.From)
			}
		}
	}
	if ran := s.Corrected + s.Uncorrected + s.Unknown; ran > 0 {
		s.Coverage = float64(s.Corrected) / float64(ran)
	}
	s.toUTC()
	p.find()
}

func (h *Host) add(m control.HostClock) {
	if m.Samples == 0 {
		h.Unknown++
		return
	}
	h.Minutes++
	if !m.Synchronised {
		h.Unsynchronised++
	}
	if max(m.Offset, -m.Offset) > max(h.Offset, -h.Offset) {
		h.Offset = m.Offset
	}
	h.EstimatedError = max(h.EstimatedError, m.EstimatedError)
	h.MaximumError = max(h.MaximumError, m.MaximumError)
}

func (s *Statement) toUTC() {
	s.ToUTC = -1
	switch {
	case s.Pauses == 0:
		s.ToUTCWhy = "no pause was recorded"
	case s.Reference != "utc":
		s.ToUTCWhy = "the reference wasn't UTC all the time: the guest's own synchronisation (chronyd, ntpd, ptp4l in the guest) has to show the rest of the chain, as on a machine that is never paused"
	case s.HostClock.Unknown > 0:
		s.ToUTCWhy = fmt.Sprintf("the state of the host's clock isn't known for %s", counted(uint64(s.HostClock.Unknown), "minute"))
	case s.HostClock.Unsynchronised > 0:
		s.ToUTCWhy = fmt.Sprintf("the host's clock wasn't synchronised in %s", counted(uint64(s.HostClock.Unsynchronised), "minute"))
	case s.Behind > 0:
		s.ToUTCWhy = "pauses were held or passed"
	default:
		s.ToUTC = s.Divergence + s.HostClock.MaximumError
	}
}

// find words what keeps the period from being shown to be right.
func (p *Report) find() {
	s := &p.Statement
	s.Findings = []string{}
	say := func(format string, args ...any) { s.Findings = append(s.Findings, fmt.Sprintf(format, args...)) }
	if s.Pauses == 0 {
		say("No pause was recorded in this time: there is nothing that could show a divergence.")
	}
	if s.Unknown > 0 {
		say("Of %s it isn't known how the clock was kept.", duration(s.Unknown))
	}
	if s.Missed > 0 {
		say("%s known by number alone: what they took, and how far the clock was off, wasn't recorded.", are(s.Missed, "pause"))
	}
	if s.Uncorrected > 0 {
		say("For %s the clock, or a pause in it, wasn't corrected.", duration(s.Uncorrected))
	}
	if s.Held > 0 {
		say("%s of pauses were held, as the policy or a limit said: the guest's clock was left behind by as much, unless somebody in the guest set it.", nanoseconds(int64(s.Held)))
	}
	if s.Passed > 0 {
		say("%s of pauses were passed, and taken from the guest's clock as by stock QEMU.", nanoseconds(int64(s.Passed)))
	}
	if s.HostClock.Unsynchronised > 0 && s.Reference != "raw" { // raw has nothing to do with it
		say("The host's clock wasn't synchronised in %s with pauses.", counted(uint64(s.HostClock.Unsynchronised), "minute"))
	}
	if len(p.Problems) > 0 {
		say("%s of the record on disk can't be read.", counted(uint64(len(p.Problems)), "part"))
	}
}

// Limit is a row of the annex of RTS 25: the largest divergence from UTC that is allowed.
type Limit struct {
	Limit time.Duration
	Who   string
}

// Limits are those of the annex's table 2.
var Limits = []Limit{
	{100 * time.Microsecond, "high-frequency algorithmic trading"},
	{time.Millisecond, "other algorithmic trading"},
	{time.Second, "voice trading, requests for quote with human intervention, negotiated transactions"},
}

// Verdict says whether the period shows that the pauses kept the clock within a limit.
func (s *Statement) Verdict(limit time.Duration) string {
	d, of := s.Divergence, "from the reference"
	if s.ToUTC >= 0 {
		d, of = s.ToUTC, "from UTC"
	}
	whole := s.Unknown == 0 && s.Missed == 0 && s.Uncorrected == 0 && s.Behind == 0
	switch {
	case s.Pauses == 0:
		return "nothing to show"
	case d > int64(limit) || int64(s.Behind) > int64(limit):
		return "exceeded"
	case !whole:
		return "not shown: see what isn't known or wasn't corrected"
	}
	return "kept, " + of
}

// nanoseconds words a time in the unit that suits it.
func nanoseconds(ns int64) string { return strings.TrimPrefix(host.SignedNanoseconds(ns), "+") }

// duration words how long something was so.
func duration(d time.Duration) string {
	if d == 0 {
		return "0 s"
	}
	return nanoseconds(int64(d))
}

func counted(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return Number(n) + " " + noun + "s"
}

func are(n uint64, noun string) string {
	if n == 1 {
		return counted(n, noun) + " is"
	}
	return counted(n, noun) + " are"
}

// Number writes a number with narrow spaces between thousands.
func Number(n uint64) string {
	text := fmt.Sprint(n)
	var b strings.Builder
	for i, digit := range text {
		if i > 0 && (len(text)-i)%3 == 0 {
			b.WriteRune('\u202f')
		}
		b.WriteRune(digit)
	}
	return b.String()
}
