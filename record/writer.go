package record

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
)

/*
Theory of operation

The pauses of a minute are added up in memory. Each time that some were added, the minute so far replaces the file
open, by a rename: a worker that takes over finds there the number of the last pause that was counted, and goes on
with the next one, which the module's ring still has. When a pause of another minute comes, or its time is over, the minute is
appended to the timeline and synced. So whatever is killed, no pause is counted twice, since a minute accounts for a range of
numbers; and what a loss of power can take is the open minute.

A pause that can't be had, because the ring went over it or its record makes no sense, is accounted for by its number,
as missed. So is a minute that the disk didn't take.

Files are opened for each write and closed again: a directory that is removed, or a disk that is full, read-only or
gone, is found at once, and found again when it is back. None of it is ever an error for the caller: Status tells.
*/

// Source is where the writer gets the pauses from. clockpage.Page is one.
type Source interface {
	Counts() clockpage.Counts
	Record(number uint64) (clockpage.Record, error)
}

// Config says whose record a Writer keeps.
type Config struct {
	Dir  string // of all records
	UUID string
	Name string
	Shim string // version
	// Run names the life of the QEMU process; see Run.
	Run    string
	Worker uint64
	// Again says that this shim kept a record before, when it didn't know the process yet.
	Again bool
	// Problem is told of trouble with the disk, once for each kind of it.
	Problem func(error)
	// Now and HostClock are replaced by tests alone.
	Now       func() time.Time
	HostClock func() (control.HostClock, error)
	// maxTimeline and segment are made smaller by tests.
	maxTimeline, segment int64
}

// Run names the life of a process: no other one, on any host, has the same name.
func Run(pid int) string {
	stat, _ := host.ReadStat(pid) // 0 for one that isn't there any more
	return fmt.Sprintf("%.13s-%d-%d", host.BootID(), pid, stat.Started)
}

// A Writer keeps one domain's record. It is used from one goroutine at a time, and there is one for a domain.
type Writer struct {
	c    Config
	path string
	run  string // c.Run, and a count where the numbers went back
	laps int

	minute    Minute
	residual  *histogram
	cost      *histogram
	next      uint64 // the number of the next pause
	lastCont  int64  // of the last pause of this run that was read, ns; 0: none
	unwritten bool   // the open minute has changed since it was written

	rescued *Minute // an earlier run's, not in the timeline yet
	state   state
	begun   bool // the begin is on disk
	stated  bool // so is the state
	rows    []byte
	rowsN   int
	problem error // the last write failed
	told    map[string]bool
	missed  uint64 // of the run
}

// missedKinds bounds how many entries a minute has about what it misses.
const missedKinds = 8

// decisionKinds bounds how many kinds of decisions a minute tells apart.
const decisionKinds = 64

// NewWriter goes on with the record of c.UUID, where the last worker left it. Nothing is on disk before the first
// Collect or SetState.
func NewWriter(c Config) *Writer {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.HostClock == nil {
		c.HostClock = control.ReadHostClock
	}
	if c.maxTimeline == 0 {
		c.maxTimeline, c.segment = maxTimeline, segmentBytes
	}
	w := &Writer{c: c, path: Path(c.Dir, c.UUID), run: c.Run, residual: newHistogram(), cost: newHistogram(), next: 1,
		told: map[string]bool{}}
	w.resume()
	return w
}

// resume finds out how far the record goes.
func (w *Writer) resume() {
	numbers, err := segments(w.path, timeline)
	w.tell(err)
	m := &Minute{} // the open one
	_, _ = scan(filepath.Join(w.path, open+suffix), func(kind string, text []byte) error {
		if found := minuteOf(kind, text); found != nil {
			m = found
		}
		return nil
	})
	var last, before Minute // on disk: this life's last one, and the last one of the open minute's run
	for _, n := range slices.Backward(numbers) {
		_, _ = scan(w.file(timeline, n), func(kind string, text []byte) error {
			found := minuteOf(kind, text)
			if found == nil {
				return nil
			}
			if w.ours(found.Run) && (found.Run != last.Run || found.Last >= last.Last) {
				last = *found
			}
			if found.Run == m.Run && found.Last >= before.Last {
				before = *found
			}
			return nil
		})
		if last.Run != "" || before.Run != "" {
			break
		}
	}
	if last.Run != "" {
		w.goOn(last)
	}
	switch {
	case m.Run == "" || m.Last <= before.Last:
	case w.ours(m.Run) && w.lapsOf(m.Run) >= w.laps:
		w.goOn(*m)
		w.minute = *m
		w.residual.restore(m.Residual)
		w.cost.restore(m.Cost)
	default:
		w.rescued = m // of a QEMU that ended together with its shim
	}
}

// goOn continues behind a minute.
func (w *Writer) goOn(m Minute) {
	w.run, w.laps, w.next, w.lastCont, w.missed = m.Run, w.lapsOf(m.Run), m.Last+1, m.To, m.MissedInRun
}

// minuteOf gives an entry's minute; nil if it holds none that can be.
func minuteOf(kind string, text []byte) *Minute {
	var m Minute
	if kind != kindMinute || json.Unmarshal(text, &m) != nil || m.Run == "" || m.First == 0 || m.Last < m.First || m.Last > maxNumber {
		return nil
	}
	return &m
}

// ours says whether a run is this process's life, whatever lap its numbers are in.
func (w *Writer) ours(run string) bool {
	base, _, _ := strings.Cut(run, "#")
	return run != "" && base == w.c.Run
}

func (w *Writer) lapsOf(run string) int {
	_, lap, _ := strings.Cut(run, "#")
	n, _ := strconv.Atoi(lap)
	return n
}

// Next is the number of the next pause that the record wants.
func (w *Writer) Next() uint64 { return w.next }

// SetState says how the clock is kept from now on, and has been for so long without anybody knowing. The same again is nothing new.
func (w *Writer) SetState(s control.State, why, reference string, unknown time.Duration) {
	next := state{Kind: kindState, State: string(s), Why: why, Reference: reference}
	same := w.state.State == next.State && w.state.Why == next.Why && w.state.Reference == next.Reference
	if same && w.stated && w.begun {
		return
	}
	if !same {
		if w.minute.Last != 0 && (w.minute.State != next.State || w.minute.Reference != next.Reference) {
			w.close() // its pauses were kept in the old way
		}
		next.At = w.c.Now()
		if unknown > 0 {
			next.Since = next.At.Add(-unknown)
		}
		w.state, w.stated = next, false
	}
	w.announce()
}

// announce writes the begin and the state, as far as they aren't on disk yet.
func (w *Writer) announce() {
	var b []byte
	if w.rescued != nil {
		b = appendEntry(b, minuteEntry{kindMinute, w.rescued})
	}
	if !w.begun {
		b = appendEntry(b, w.begin(w.lastCont, w.c.Again))
	}
	if !w.stated && w.state.State != "" {
		b = appendEntry(b, w.state)
	}
	if len(b) > 0 && w.append(timeline, b, true) {
		w.rescued, w.begun, w.stated = nil, true, w.state.State != ""
	}
}

// begin says that this worker keeps the record, from after the cont at last on.
func (w *Writer) begin(last int64, again bool) begin {
	return begin{Kind: kindBegin, At: w.c.Now(), Run: w.run, Name: w.c.Name, Shim: w.c.Shim, Worker: w.c.Worker, Last: last, Again: again}
}

// whole is the minute with its distributions.
func (w *Writer) whole() *Minute {
	w.minute.Residual, w.minute.Cost = w.residual.distribution(), w.cost.distribution()
	w.minute.MissedInRun = w.missed
	return &w.minute
}

// close appends the open minute to the timeline. If the disk doesn't take it, its pauses are missed by the next one.
func (w *Writer) close() {
	m := w.whole()
	w.announce()
	w.flushRows()
	ok := w.append(timeline, appendEntry(nil, minuteEntry{kindMinute, m}), true)
	w.residual.reset()
	w.cost.reset()
	if ok {
		w.minute = Minute{}
		return
	}
	w.missed += m.Pauses
	from := m.From
	if from == 0 && len(m.Missed) > 0 {
		from = m.Missed[0].From
	}
	w.minute = Minute{Missed: []Missed{{Why: Unwritten, First: m.First, Last: m.Last, Count: m.Last - m.First + 1, From: from, To: m.To}}}
}

// flush writes what was collected: the pauses, and the minute as far as it goes.
func (w *Writer) flush() {
	w.announce()
	w.flushRows()
	if !w.unwritten || w.minute.Last == 0 {
		return
	}
	b := appendEntry(nil, w.head(open))
	b = appendEntry(b, minuteEntry{kindMinute, w.whole()})
	if w.replaceOpen(b) {
		w.unwritten = false
	}
}

// flushRows writes the pauses one by one. They come before the minute that counts them: if they come twice, readers see it
// by their numbers.
func (w *Writer) flushRows() {
	if w.rowsN == 0 {
		return
	}
	text := append([]byte(`{"kind":"`+kindPauses+`","run":"`+w.run+`","rows":[`), w.rows...)
	w.append(pauses, appendLine(nil, append(text, `]}`...)), false)
	w.rows, w.rowsN = w.rows[:0], 0
}

// Settle appends the open minute if it is over, and writes the rest. For a reader who is about to come.
func (w *Writer) Settle() {
	w.owe()
	if w.minute.Last != 0 && !w.minute.Start.Equal(w.c.Now().UTC().Truncate(time.Minute)) {
		w.close()
	}
	w.flush()
}

// SettleMinute settles the open minute if it is over, and says how long it still takes if it isn't; 0 where there is none.
func (w *Writer) SettleMinute() time.Duration {
	if w.minute.Last == 0 {
		return 0
	}
	if left := w.minute.Start.Add(time.Minute).Sub(w.c.Now()); left > 0 && left <= time.Minute {
		return left
	}
	w.Settle()
	return 0
}

// End appends what is open and says why nobody keeps the record any more.
func (w *Writer) End(why End) {
	w.owe()
	if w.minute.Last != 0 {
		w.close()
	}
	w.flush()
	w.append(timeline, appendEntry(nil, end{Kind: kindEnd, At: w.c.Now(), Why: why}), true)
}

// owe has a minute that the disk didn't take be told of as missed, even if no other one comes.
func (w *Writer) owe() {
	if w.minute.Last == 0 && len(w.minute.Missed) > 0 {
		w.open(w.c.Now().UnixNano())
		w.unwritten = true
	}
}

// Status is what the writer knows of its own work.
func (w *Writer) Status() *control.RecordStatus {
	s := &control.RecordStatus{Path: w.path, Pauses: w.next - 1 - w.missed, Missed: w.missed, Run: w.run}
	if w.problem != nil {
		s.Problem = w.problem.Error()
	}
	if m := w.minute; m.Last != 0 {
		s.Host = m.Host
	} else if h, err := w.c.HostClock(); err == nil {
		s.Host = h
	}
	return s
}
