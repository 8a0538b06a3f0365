package record

import (
	"errors"
	"strconv"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

// Collect reads the pauses that are new, and writes what it has. It gives how many there were.
func (w *Writer) Collect(from Source) (n uint64) {
	newest, now := from.Counts().Pauses, w.c.Now()
	if newest > maxNumber {
		return 0 // no module counts that far: the page is being played with
	}
	if newest+1 < w.next {
		w.lap()
	}
	if newest < w.next {
		return 0
	}
	n = newest - w.next + 1
	clock, err := w.c.HostClock()
	if err != nil {
		clock = control.HostClock{}
	}
	first := w.next
	var missing holes
	if n > clockpage.RingLen {
		first = newest - clockpage.RingLen + 1
		missing.add(Overwritten, w.next, first-1)
	}
	ring := ring{from: from, now: now}
	for number := first; number <= newest; number++ {
		r, why := ring.read(number)
		if why != "" {
			missing.add(why, number, number)
			continue
		}
		w.settle(&missing, int64(r.ContReal))
		w.add(&r, clock)
	}
	w.settle(&missing, now.UnixNano())
	w.minute.Host = w.minute.Host.Merge(clock)
	w.flush()
	return n
}

// maxNumber is more pauses than there ever are: 200 a second for 100 million years.
const maxNumber = 1 << 60

// maxTorn bounds how many torn records are looked at. The module writes one at a time: a page with more is being played with.
const maxTorn = 3

// ring reads records.
type ring struct {
	from Source
	now  time.Time
	torn int
}

// read reads a record, or says why it can't be had.
func (r *ring) read(number uint64) (clockpage.Record, Why) {
	if r.torn >= maxTorn {
		return clockpage.Record{}, Unreadable
	}
	record, err := r.from.Record(number)
	switch {
	case errors.Is(err, clockpage.ErrStale):
		return record, Overwritten
	case errors.Is(err, clockpage.ErrTorn):
		r.torn++
	case err == nil:
		err = bad(&record, r.now)
	}
	if err != nil {
		return record, Unreadable
	}
	return record, ""
}

// holes are pauses that can't be had. They wait for a minute to be of: that of the next pause that is there.
type holes []Missed

func (h *holes) add(why Why, first, last uint64) {
	all := *h
	if k := len(all) - 1; k >= 0 && (all[k].Why == why && all[k].Last+1 == first || k >= 2*missedKinds) {
		all[k].Last = last
		return
	}
	*h = append(all, Missed{Why: why, First: first, Last: last})
}

// settle counts what is missing as of that moment.
func (w *Writer) settle(missing *holes, at int64) {
	for _, x := range *missing {
		w.open(at)
		x.Count, x.From, x.To = x.Last-x.First+1, w.lastCont, at
		w.miss(x)
	}
	*missing = nil
}

// lap begins to count anew: the page is another one, though the process is the same.
func (w *Writer) lap() {
	if w.minute.Last != 0 {
		w.close()
	}
	w.laps++
	w.run = w.c.Run + "#" + strconv.Itoa(w.laps)
	w.next, w.lastCont, w.missed = 1, 0, 0
	w.minute = Minute{}
	w.append(timeline, appendEntry(nil, w.begin(0, true)), true)
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

func (w *Writer) add(r *clockpage.Record, clock control.HostClock) {
	w.open(int64(r.ContReal))
	m := &w.minute
	if m.Pauses == 0 {
		m.From = int64(r.ContReal)
	}
	m.To = int64(r.ContReal)
	m.Last, w.next, w.lastCont = r.Number, r.Number+1, m.To
	m.Pauses++
	if m.Host.Samples == 0 {
		m.Host = clock
	}
	lost := r.Took()
	m.Lost += lost
	switch {
	case r.CaughtUp():
		m.CaughtUp += lost
	case r.Decision == clockpage.Held:
		m.Held += lost
	default:
		m.Passed += lost
	}
	if r.StopRaw != 0 { // the module saw the stop
		w.residual.add(r.ResidualStop, 1)
	}
	w.cost.add(int64(r.Cost), 1)
	d := Decision{Outcome: r.Outcome, Count: 1, Lost: lost}
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
