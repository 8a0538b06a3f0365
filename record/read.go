package record

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ftclock/control"
)

// ErrNone is the error of a domain that has no record.
var ErrNone = errors.New("there is no record of it")

var errDamaged = errors.New("damaged")

// A Record is what is known of a domain's clock over a time.
type Record struct {
	UUID string
	Name string // the newest that the domain had
	// Begin is when the first entry on disk was written, whatever was asked for: older ones have been removed, or there were
	// none.
	Begin time.Time
	// Seen is when the shim last wrote anything.
	Seen time.Time
	// Minutes are those with pauses, oldest first. A minute that isn't here had none, if it lies within a Span and in no Gap.
	Minutes []Minute
	// Spans are the times over which the record was kept, oldest first, each with one state. While the shim
	// lives, the last one has no end.
	Spans []Span
	// Gaps are what isn't known or wasn't corrected, by From. They may overlap.
	Gaps []Gap
	// Problems are the files, or parts of them, that couldn't be read.
	Problems []Problem
}

// Span is a time with one state.
type Span struct {
	From, To  time.Time // To is zero where no end was written: it goes on, or the shim was killed after Record.Seen
	State     control.State
	Why       string
	Reference string // "raw" or "utc"
	Run       string
}

// GapKind says what a gap is.
type GapKind string

// The values of GapKind.
const (
	// Down: no shim was there to keep the record.
	Down GapKind = "no shim"
	// NotKept: a shim was there, these pauses are known by their number alone.
	NotKept GapKind = "not recorded"
	// Uncorrected: the record is whole, the clock wasn't corrected.
	Uncorrected GapKind = "uncorrected"
	// Damage: entries can't be read.
	Damage GapKind = "damaged"
	// Newer: a newer version of ftclock has written them.
	Newer GapKind = "newer version"
)

// Gap is a time of which the record doesn't say that the clock was right.
type Gap struct {
	Kind     GapKind
	From, To time.Time // zero where that isn't known; To, while it goes on
	// Pauses is how many are known to be missing or uncorrected. With Down, 0 means either that none were, by the module's
	// own numbers, or that nothing is known; Why says it.
	Pauses uint64
	Why    string
}

// Problem is a file, or a part of one, that can't be read. Nothing is removed or overwritten because of it.
type Problem struct {
	File string
	What string
}

func (p Problem) String() string { return p.File + ": " + p.What }

// Domains lists the UUIDs of the domains that have a record below dir, sorted.
func Domains(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing records: %w", err)
	}
	var uuids []string
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		files, err := filepath.Glob(filepath.Join(dir, e.Name(), "*"+suffix))
		if err == nil && len(files) > 0 {
			uuids = append(uuids, e.Name())
		}
	}
	return uuids, nil
}

// Read reads a domain's record from since to until; a zero time is no bound. Minutes and gaps that reach into that time are
// given whole. The error is of a record that isn't there (ErrNone) or can't be opened at all; whatever else is wrong is in
// Problems and Gaps.
//
// A shim writes some of what it has only when it is asked for its status: ask it before, with package control.
func Read(dir, uuid string, since, until time.Time) (*Record, error) {
	path := Path(dir, uuid)
	if _, err := os.Stat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrNone
		}
		return nil, fmt.Errorf("reading the record of %s: %w", uuid, err)
	}
	numbers, err := segments(path, timeline)
	if err != nil {
		return nil, err
	}
	b := builder{r: &Record{UUID: uuid}, seen: map[string]uint64{}, since: since, until: until}
	for _, n := range numbers {
		if err := b.file(filepath.Join(path, segmentName(timeline, n))); err != nil {
			return nil, err
		}
	}
	err = b.file(filepath.Join(path, open+suffix))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if asides, err := filepath.Glob(filepath.Join(path, open+suffix+".newer-*")); err == nil {
		for _, name := range asides {
			if err := b.file(name); err != nil {
				return nil, err
			}
		}
	}
	if b.r.Begin.IsZero() && len(b.r.Problems) == 0 {
		return nil, fmt.Errorf("reading the record of %s: %w", uuid, ErrNone)
	}
	b.finish()
	return b.r, nil
}

// Pauses reads the last pauses one by one, oldest first, as far as they are still there.
func Pauses(dir, uuid string, since, until time.Time) ([]Pause, []Problem, error) {
	path := Path(dir, uuid)
	numbers, err := segments(path, pauses)
	if err != nil {
		return nil, nil, err
	}
	var all []Pause
	var problems []Problem
	seen := map[string]uint64{}
	for _, n := range numbers {
		found, err := scan(filepath.Join(path, segmentName(pauses, n)), func(kind string, text []byte) error {
			var block struct {
				Run  string    `json:"run"`
				Rows [][]int64 `json:"rows"`
			}
			if kind != kindPauses {
				return nil
			}
			if err := json.Unmarshal(text, &block); err != nil {
				return errDamaged
			}
			for _, numbers := range block.Rows {
				r, err := fromRow(numbers)
				if err != nil {
					return errDamaged
				}
				// A worker that was killed may have written some that the next one wrote again.
				if r.Number <= seen[block.Run] {
					continue
				}
				seen[block.Run] = r.Number
				at := time.Unix(0, int64(r.ContReal))
				if at.Before(since) || !until.IsZero() && !at.Before(until) {
					continue
				}
				all = append(all, Pause{block.Run, r})
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
		problems = append(problems, found...)
	}
	return all, problems, nil
}

// Total is all minutes as one; Start and Run are the first one's.
func (r *Record) Total() Minute {
	var total Minute
	for i := range r.Minutes {
		if i == 0 {
			total = r.Minutes[0]
			continue
		}
		total.merge(&r.Minutes[i])
	}
	return total
}

// builder makes a Record of the entries as they come.
type builder struct {
	r            *Record
	since, until time.Time
	seen         map[string]uint64 // by run: the last number
	run          string
	span         *Span // the open one
	ended        *end
	lastTo       int64 // CLOCK_REALTIME of the last pause
}

func (b *builder) file(name string) error {
	before := b.r.Seen
	found, err := scan(name, b.entry)
	if err != nil {
		return err
	}
	for _, p := range found {
		b.r.Problems = append(b.r.Problems, p)
		gap := Gap{Kind: Damage, From: before, To: b.r.Seen, Why: p.String()}
		if p.What == newerText {
			gap.Kind, gap.To = Newer, time.Time{}
		}
		b.gap(gap)
	}
	return nil
}

func (b *builder) gap(g Gap) {
	if !g.To.IsZero() && g.To.Before(b.since) || !b.until.IsZero() && !g.From.IsZero() && g.From.After(b.until) {
		return
	}
	b.r.Gaps = append(b.r.Gaps, g)
}

// at notes a sign of the shim's life.
func (b *builder) at(t time.Time) {
	if t.UnixNano() == 0 {
		return
	}
	if b.r.Begin.IsZero() {
		b.r.Begin = t
	}
	if t.After(b.r.Seen) {
		b.r.Seen = t
	}
}

// entry takes one. What can't be is damage.
func (b *builder) entry(kind string, text []byte) error {
	switch kind {
	case kindBegin:
		return take(text, b.begin)
	case kindState:
		return take(text, b.state)
	case kindMinute:
		m := minuteOf(kind, text)
		if m == nil {
			return errDamaged
		}
		b.minute(m)
	case kindEnd:
		return take(text, b.end)
	}
	return nil
}

// take gives an entry to who uses it.
func take[T any](text []byte, use func(T)) error {
	var e T
	if json.Unmarshal(text, &e) != nil {
		return errDamaged
	}
	use(e)
	return nil
}

func (b *builder) end(e end) {
	b.at(e.At)
	b.closeSpan(e.At)
	b.ended = &e
}

func (b *builder) begin(e begin) {
	b.r.Name = e.Name
	b.at(time.Unix(0, e.Last))
	last := b.r.Seen
	defer b.at(e.At)
	sameRun := e.Run == b.run || e.Again && b.seen[b.run] == 0
	b.run = e.Run
	if b.span == nil && b.ended == nil || e.Again && sameRun {
		return // the first, or a new file
	}
	gap := Gap{Kind: Down, From: last, To: e.At}
	switch {
	case e.Again:
		gap.Why = "the module in QEMU was replaced, and its numbers began anew"
	case b.ended != nil && b.ended.Why == EndQEMU:
		gap.Kind = "" // there was no clock
	case b.ended != nil:
		gap.Why = "the shim was told to end (" + string(b.ended.Why) + ")"
		if sameRun {
			gap.Why += "; QEMU ran on, and the module counted its pauses"
		}
	case sameRun && e.Worker > 1:
		gap.Kind = "" // one worker took over from another: the numbers go on, and show it if they don't
	case sameRun:
		gap.Why = "the shim was killed; QEMU ran on, and the module counted its pauses"
	default:
		gap.Why = "the shim was killed, or the host went down"
	}
	if gap.Kind != "" {
		b.gap(gap)
	}
	if b.span != nil && gap.Kind != "" {
		b.closeSpan(last)
	}
	b.ended = nil
}

func (b *builder) state(e state) {
	b.at(e.At)
	from := e.At
	if b.span != nil {
		if b.span.State == control.State(e.State) && b.span.Reference == e.Reference && b.span.Why == e.Why && b.span.Run == b.run {
			return
		}
		if e.Since.After(b.span.From) {
			from = e.Since
		} else if !e.Since.IsZero() {
			from = b.span.From
		}
		b.closeSpan(from)
	}
	b.ended = nil
	b.span = &Span{From: from, State: control.State(e.State), Why: e.Why, Reference: e.Reference, Run: b.run}
}

// closeSpan ends the open span.
func (b *builder) closeSpan(at time.Time) {
	if b.span == nil {
		return
	}
	s := *b.span
	b.span = nil
	s.To = at
	b.keepSpan(s)
}

func (b *builder) keepSpan(s Span) {
	if !s.To.IsZero() && s.To.Before(b.since) || !b.until.IsZero() && s.From.After(b.until) {
		return
	}
	b.r.Spans = append(b.r.Spans, s)
	why := s.Why
	switch s.State {
	case control.Correcting, control.Starting:
		return
	case control.Watching:
		why = "it was only watched"
	case control.Unkept:
		why = "the guest had switched on no clock that ftclock keeps"
	}
	b.gap(Gap{Kind: Uncorrected, From: s.From, To: s.To, Why: why})
}

func (b *builder) minute(m *Minute) {
	seen := b.seen[m.Run]
	if m.Last <= seen {
		return // the open minute, appended in the meantime
	}
	b.at(time.Unix(0, max(m.To, m.Start.UnixNano())))
	if seen > 0 && m.First > seen+1 {
		b.gap(Gap{Kind: Damage, From: unixTime(b.lastTo), To: unixTime(m.From), Pauses: m.First - seen - 1, Why: "entries are missing"})
	}
	b.seen[m.Run] = m.Last
	b.lastTo = m.To
	end := m.Start.Add(time.Minute)
	if !end.After(b.since) || !b.until.IsZero() && !m.Start.Before(b.until) {
		return
	}
	for _, x := range m.Missed {
		b.gap(Gap{Kind: NotKept, From: unixTime(x.From), To: unixTime(x.To), Pauses: x.Count, Why: "pauses " + string(x.Why)})
	}
	if n := m.uncorrected(); n > 0 {
		b.gap(Gap{Kind: Uncorrected, From: unixTime(m.From), To: unixTime(m.To), Pauses: n, Why: m.whyUncorrected()})
	}
	if k := len(b.r.Minutes) - 1; k >= 0 && b.r.Minutes[k].Start.Equal(m.Start) && b.r.Minutes[k].Run == m.Run && b.r.Minutes[k].State == m.State {
		b.r.Minutes[k].merge(m)
		return
	}
	b.r.Minutes = append(b.r.Minutes, *m)
}

func (m *Minute) whyUncorrected() string {
	var whys []string
	for _, d := range m.Decisions {
		if why := d.Reason.String(); d.Uncorrected() && !slices.Contains(whys, why) {
			whys = append(whys, why)
		}
	}
	return strings.Join(whys, "; ")
}

func unixTime(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func (b *builder) finish() {
	if b.span != nil {
		s := *b.span
		b.span = nil
		b.keepSpan(s)
	}
	slices.SortStableFunc(b.r.Gaps, func(x, y Gap) int { return x.From.Compare(y.From) })
}

// newerText is the problem of a file that a newer version has written.
const newerText = "it was written by a newer version of ftclock and is left as it is; read it with that one"

// scan gives each entry of a file to each, and collects what is wrong with it. An entry that each finds damaged is damage,
// too. The error is of a file that can't be read at all.
func scan(name string, each func(kind string, text []byte) error) ([]Problem, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	defer f.Close()
	var problems []Problem
	in := bufio.NewReaderSize(f, 32<<10)
	damagedAt, damaged := 0, 0 // the first line, and how many
	flush := func() {
		if damaged > 0 {
			problems = append(problems, Problem{name, fmt.Sprintf("%d damaged from line %d on, left out", damaged, damagedAt)})
		}
		damaged = 0
	}
	for number := 1; ; number++ {
		line, whole, err := readLine(in)
		if err != nil && !errors.Is(err, io.EOF) {
			return problems, fmt.Errorf("reading the record: %s: %w", name, err)
		}
		if len(line) == 0 && err != nil {
			if number == 1 {
				problems = append(problems, Problem{name, "it is empty: what was written to it is lost"})
			}
			break
		}
		text, ok := parseLine(line)
		if number == 1 {
			v, verr := version(line)
			switch {
			case verr == nil && v > Version:
				return []Problem{{name, newerText}}, nil
			case verr == nil && whole:
				continue
			}
			ok = false
		}
		var entry struct {
			Kind string `json:"kind"`
		}
		if !whole && err != nil {
			flush()
			problems = append(problems, Problem{name, fmt.Sprintf("the last entry, line %d, wasn't written to its end, left out", number)})
			break
		}
		if !ok || json.Unmarshal(text, &entry) != nil || each(entry.Kind, text) != nil {
			if damaged++; damaged == 1 {
				damagedAt = number
			}
			continue
		}
		flush()
	}
	flush()
	return problems, nil
}

// readLine reads a line without its newline; whole says that there was one. Of a line longer than any entry it gives the
// beginning.
func readLine(in *bufio.Reader) (line []byte, whole bool, err error) {
	for {
		part, err := in.ReadSlice('\n')
		if len(line) <= maxLine {
			line = append(line, part...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		line, whole = bytes.CutSuffix(line, []byte{'\n'})
		return line, whole, err
	}
}

// Name is the newest name that a domain had, as far as its record says; empty where it can't be read.
func Name(dir, uuid string) string {
	path := Path(dir, uuid)
	numbers, err := segments(path, timeline)
	if err != nil {
		return ""
	}
	name := ""
	for _, n := range slices.Backward(numbers) { // each file begins with it
		_, _ = scan(filepath.Join(path, segmentName(timeline, n)), func(kind string, text []byte) error {
			var e begin
			if kind == kindBegin && json.Unmarshal(text, &e) == nil {
				name = e.Name
			}
			return nil
		})
		if name != "" {
			break
		}
	}
	return name
}
