package record

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
	HostClock func() (HostClock, error)
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
		c.HostClock = ReadHostClock
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
		b = appendEntry(b, begin{Kind: kindBegin, At: w.c.Now(), Run: w.run, Name: w.c.Name, Shim: w.c.Shim, Worker: w.c.Worker,
			Last: w.lastCont, Again: w.c.Again})
	}
	if !w.stated && w.state.State != "" {
		b = appendEntry(b, w.state)
	}
	if len(b) > 0 && w.append(timeline, b, true) {
		w.rescued, w.begun, w.stated = nil, true, w.state.State != ""
	}
}

// Collect reads the pauses that are new, and writes what it has. It gives how many there were.
func (w *Writer) Collect(from Source) (n uint64) {
	newest := from.Counts().Pauses
	now := w.c.Now()
	if newest > maxNumber {
		return 0 // no module counts that far: the page is being played with
	}
	if newest+1 < w.next {
		w.lap(now)
	}
	if newest < w.next {
		return 0
	}
	n = newest - w.next + 1
	host, err := w.c.HostClock()
	if err != nil {
		host = HostClock{}
	}
	gone := uint64(0) // before this number nothing can be had
	if n > clockpage.RingLen {
		gone = newest - clockpage.RingLen + 1
	}
	// What is missing has to be of a minute: of the next pause's that is there.
	type hole struct {
		why         Why
		first, last uint64
	}
	var holes []hole
	miss := func(why Why, first, last uint64) {
		if k := len(holes) - 1; k >= 0 && holes[k].why == why && holes[k].last+1 == first {
			holes[k].last = last
		} else if k >= 2*missedKinds {
			holes[k].last = last
		} else {
			holes = append(holes, hole{why, first, last})
		}
	}
	settle := func(at int64) {
		for _, h := range holes {
			w.open(at)
			w.miss(Missed{Why: h.why, First: h.first, Last: h.last, Count: h.last - h.first + 1, From: w.lastCont, To: at})
		}
		holes = holes[:0]
	}
	if gone > 0 {
		miss(Overwritten, w.next, gone-1)
	}
	unread := 0
	for number := max(w.next, gone); number <= newest; number++ {
		var r clockpage.Record
		err := errTooMany
		// The module writes one record at a time: a page with more torn ones is being played with.
		if unread < 3 {
			r, err = from.Record(number)
		}
		switch {
		case errors.Is(err, clockpage.ErrStale):
			miss(Overwritten, number, number)
			continue
		case err == nil:
			err = bad(&r, now)
		case errors.Is(err, clockpage.ErrTorn):
			unread++
		}
		if err != nil {
			miss(Unreadable, number, number)
			continue
		}
		if len(holes) > 0 {
			settle(int64(r.ContReal))
		}
		w.add(&r, host)
	}
	settle(now.UnixNano())
	w.minute.Host = w.minute.Host.Merge(host)
	w.flush()
	return n
}

// maxNumber is more pauses than there ever are: 200 a second for 100 million years.
const maxNumber = 1 << 60

var errTooMany = errors.New("too many torn records")

// lap begins to count anew: the page is another one, though the process is the same.
func (w *Writer) lap(now time.Time) {
	if w.minute.Last != 0 {
		w.close()
	}
	w.laps++
	w.run = w.c.Run + "#" + strconv.Itoa(w.laps)
	w.next, w.lastCont, w.missed = 1, 0, 0
	w.minute = Minute{}
	w.append(timeline, appendEntry(nil, begin{Kind: kindBegin, At: now, Run: w.run, Name: w.c.Name, Shim: w.c.Shim, Worker: w.c.Worker,
		Again: true}), true)
}

// open has the minute of that moment be the open one.
func (w *Writer) open(at int64) {
	start := time.Unix(0, at).UTC().Truncate(time.Minute)
	m := &w.minute
	if m.Last != 0 && m.Start.Equal(start) && m.Run == w.run {
		return
	}
	if m.Last != 0 {
		w.close()
	}
	*m = Minute{Start: start, Run: w.run, First: w.next, Last: w.next - 1, State: w.state.State, Reference: w.state.Reference, Missed: m.Missed}
	if len(m.Missed) > 0 { // of a minute that the disk didn't take
		m.First = m.Missed[0].First
	}
}

func (w *Writer) miss(x Missed) {
	m := &w.minute
	m.Last, w.next = x.Last, x.Last+1
	w.missed += x.Count
	w.unwritten = true
	if k := len(m.Missed) - 1; k >= 0 && (m.Missed[k].Why == x.Why && m.Missed[k].Last+1 == x.First || k+1 >= missedKinds) {
		m.Missed[k].Last, m.Missed[k].To = x.Last, x.To
		m.Missed[k].Count += x.Count
		return
	}
	m.Missed = append(m.Missed, x)
}

func (w *Writer) add(r *clockpage.Record, host HostClock) {
	w.open(int64(r.ContReal))
	m := &w.minute
	if m.Pauses == 0 {
		m.From = int64(r.ContReal)
	}
	m.To = int64(r.ContReal)
	m.Last, w.next, w.lastCont = r.Number, r.Number+1, m.To
	m.Pauses++
	if m.Host.Samples == 0 {
		m.Host = host
	}
	if r.StopRaw != 0 { // the module saw the stop
		lost := uint64(r.Lost)
		m.Lost += lost
		switch r.Decision {
		case clockpage.Dropped, clockpage.Anchored:
			m.CaughtUp += lost
		case clockpage.Held:
			m.Held += lost
		default:
			m.Passed += lost
		}
		w.residual.add(r.ResidualStop, 1)
	}
	w.cost.add(int64(r.Cost), 1)
	d := Decision{Decision: r.Decision, Reason: r.Reason, Event: r.Event, Count: 1, Lost: uint64(r.Lost)}
	if all := count(m.Decisions, d); len(all) <= decisionKinds {
		m.Decisions = all
	} else {
		m.Decisions[decisionKinds-1].Count++
		m.Decisions[decisionKinds-1].Lost += d.Lost
	}
	if w.rowsN > 0 {
		w.rows = append(w.rows, ',')
	}
	w.rows = row(w.rows, r)
	w.rowsN++
	w.unwritten = true
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

// Over settles the open minute if it is over, and says how long it still takes if it isn't; 0 where there is none.
func (w *Writer) Over() time.Duration {
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
		s.Host = control.HostClock(m.Host)
	} else if h, err := w.c.HostClock(); err == nil {
		s.Host = control.HostClock(h)
	}
	return s
}

// --- files ---

func (w *Writer) file(kind string, n int) string {
	return filepath.Join(w.path, segmentName(kind, n))
}

func segmentName(kind string, n int) string { return fmt.Sprintf("%s-%06d%s", kind, n, suffix) }

func (w *Writer) head(kind string) head {
	return head{Kind: kindHead, Format: formatName, Version: Version, Holds: kind, UUID: w.c.UUID}
}

// segments lists the numbers of the files of a kind, ascending.
func segments(path, kind string) (numbers []int, err error) {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing the record: %w", err)
	}
	for _, e := range entries {
		middle, ok := strings.CutPrefix(e.Name(), kind+"-")
		if middle, found := strings.CutSuffix(middle, suffix); ok && found {
			if n, err := strconv.Atoi(middle); err == nil && n > 0 && e.Type().IsRegular() {
				numbers = append(numbers, n)
			}
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// append writes entries to the newest file of the kind, or to a new one, and tells whether that was done.
func (w *Writer) append(kind string, b []byte, sync bool) bool {
	err := w.tryAppend(kind, b, sync)
	w.tell(err)
	w.problem = err
	return err == nil
}

// makeDir makes the domain's directory. That of all records was made at the shim's start: if it is gone, ftclock was purged, and
// nothing may be left.
func (w *Writer) makeDir() error {
	if err := os.Mkdir(w.path, 0o700); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (w *Writer) tryAppend(kind string, b []byte, sync bool) error {
	if err := w.makeDir(); err != nil {
		return fmt.Errorf("keeping the record: %w", err)
	}
	numbers, err := segments(w.path, kind)
	if err != nil {
		return err
	}
	newest := 0
	if len(numbers) > 0 {
		newest = numbers[len(numbers)-1]
	}
	if newest > 0 {
		done, err := w.appendTo(w.file(kind, newest), b, sync)
		if done || err != nil {
			return err
		}
	}
	// A new file. One in which a new minute begins says again what is to be known.
	text := appendEntry(nil, w.head(kind))
	if kind == timeline && w.begun {
		text = appendEntry(text, begin{Kind: kindBegin, At: w.c.Now(), Run: w.run, Name: w.c.Name, Shim: w.c.Shim, Worker: w.c.Worker, Again: true})
		if w.stated {
			again := w.state
			again.Again = true
			text = appendEntry(text, again)
		}
	}
	name := w.file(kind, newest+1)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("keeping the record: %w", err)
	}
	_, err = f.Write(append(text, b...))
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(name)
		return fmt.Errorf("keeping the record: %w", err)
	}
	if sync {
		syncDir(w.path)
	}
	w.prune(kind, append(numbers, newest+1))
	return nil
}

// appendTo appends to a file. Not done and no error: it is full, or it isn't ours to write to.
func (w *Writer) appendTo(name string, b []byte, sync bool) (done bool, err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	if size+int64(len(b)) > w.c.segment {
		return false, nil
	}
	first := make([]byte, min(size, 512))
	if _, err := f.ReadAt(first, 0); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("reading the record: %w", err)
	}
	line, _, _ := strings.Cut(string(first), "\n")
	if v, err := version([]byte(line)); err != nil || v != Version {
		return false, nil // a newer version's, or damaged: left as it is, a new file goes on beside it
	}
	// What a write that was cut short left becomes a line of its own, which readers find damaged.
	last := []byte{'\n'}
	if _, err := f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
		b = append([]byte{'\n'}, b...)
	}
	if _, err := f.Write(b); err != nil {
		_ = f.Truncate(size) // half an entry is none
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	if sync {
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			_ = f.Truncate(size)
			return false, fmt.Errorf("keeping the record: syncing %s: %w", name, err)
		}
	}
	return true, nil
}

// version reads a file's first entry.
func version(line []byte) (int, error) {
	var h head
	text, ok := parseLine(line)
	if !ok || json.Unmarshal(text, &h) != nil || h.Kind != kindHead || h.Format != formatName {
		return 0, errDamaged
	}
	return h.Version, nil
}

// prune removes the oldest files of a kind beyond its bound. Newer versions' files aren't counted, and stay.
func (w *Writer) prune(kind string, numbers []int) {
	bound := w.c.maxTimeline
	if kind == pauses {
		bound = 2 * w.c.segment
	}
	total := w.c.segment // what the newest may become
	for _, n := range slices.Backward(numbers[:len(numbers)-1]) {
		name := w.file(kind, n)
		info, err := os.Stat(name)
		if err != nil || newerVersion(name) {
			continue
		}
		if total += info.Size(); total > bound {
			_ = os.Remove(name)
		}
	}
}

func newerVersion(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	line, _, _ := bufio.NewReaderSize(f, 1024).ReadLine()
	v, err := version(line)
	return err == nil && v > Version
}

// replaceOpen puts another open minute in the place of the last one, unless that is a newer version's.
func (w *Writer) replaceOpen(b []byte) bool {
	name := filepath.Join(w.path, open+suffix)
	err := func() error {
		if err := w.makeDir(); err != nil {
			return err
		}
		if newerVersion(name) {
			if err := os.Rename(name, setAside(name)); err != nil {
				return err
			}
		}
		if err := os.WriteFile(name+".new", b, 0o600); err != nil {
			_ = os.Remove(name + ".new")
			return err
		}
		return os.Rename(name+".new", name)
	}()
	if err != nil {
		err = fmt.Errorf("keeping the record: %w", err)
	}
	w.tell(err)
	w.problem = err
	return err == nil
}

// setAside is a name that is free, for a file that must not be lost.
func setAside(name string) string {
	for i := 1; ; i++ {
		aside := name + ".newer-" + strconv.Itoa(i)
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			return aside
		}
	}
}

func syncDir(path string) {
	if d, err := os.Open(path); err == nil {
		_ = d.Sync()
		_ = d.Close()
	}
}

// tell reports trouble, each kind of it once.
func (w *Writer) tell(err error) {
	if err == nil || w.c.Problem == nil || w.told[kindOf(err)] {
		return
	}
	w.told[kindOf(err)] = true
	w.c.Problem(err)
}

func kindOf(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return "other"
}
