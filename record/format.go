package record

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"path/filepath"
	"slices"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
)

// Version is the version of the files' format. A reader takes files of its own version and of older ones; it leaves
// newer ones alone and says so. A change that an old reader would misunderstand takes a new number; a member that it
// may overlook doesn't.
//
// Version 1: the first.
const Version = 1

const formatName = "ftclock-record"

// Kinds of files. A file's name is its kind, a dash, its number and suffix; the open minute's has no number.
const (
	timeline = "timeline" // who kept the record when, and the minutes
	pauses   = "pauses"   // the last pauses
	open     = "open"     // the minute that isn't over
	suffix   = ".log"
)

// Bounds of the files, in bytes.
const (
	// MaxBytes bounds a domain's record, but for files of a newer version, which aren't ours to remove.
	MaxBytes = 64 << 20

	segmentBytes = 4 << 20
	maxTimeline  = MaxBytes - 2*segmentBytes - 2*maxLine // the pauses have two files, and the open minute one
	maxLine      = 1 << 20
)

// Path is a domain's directory.
func Path(dir, uuid string) string { return filepath.Join(dir, uuid) }

// Kinds of entries.
const (
	kindHead   = "head"
	kindBegin  = "begin"
	kindState  = "state"
	kindMinute = "minute"
	kindEnd    = "end"
	kindPauses = "pauses"
)

// head is a file's first entry.
type head struct {
	Kind    string `json:"kind"`
	Format  string `json:"format"`
	Version int    `json:"version"`
	Holds   string `json:"holds"` // the file's kind
	UUID    string `json:"uuid"`
}

// begin says that a worker begins to keep the record.
type begin struct {
	Kind   string    `json:"kind"`
	At     time.Time `json:"at"`
	Run    string    `json:"run"`
	Name   string    `json:"name"`
	Shim   string    `json:"shim"`   // version
	Worker uint64    `json:"worker"` // each but the first took over from one that died
	// Last is CLOCK_REALTIME at the last cont of this run that is in the record, ns; 0: there is none.
	Last int64 `json:"last_ns,omitempty"`
	// Again is set where a new file repeats what the last one said, or the numbers went back.
	Again bool `json:"again,omitempty"`
}

// state says how the clock is kept from now on.
type state struct {
	Kind      string    `json:"kind"`
	At        time.Time `json:"at"`
	Since     time.Time `json:"since,omitzero"` // it was so before At, when nobody knew yet
	State     string    `json:"state"`          // control.State
	Why       string    `json:"why,omitempty"`
	Reference string    `json:"reference,omitempty"`
	Again     bool      `json:"again,omitempty"`
}

// end says that nobody keeps the record any more, and why.
type end struct {
	Kind string    `json:"kind"`
	At   time.Time `json:"at"`
	Why  End       `json:"why"`
}

// End is why a shim ended.
type End string

// The values of End.
const (
	EndQEMU    End = "qemu"    // QEMU has ended: there is no clock to keep
	EndRequest End = "request" // it was asked to; QEMU runs on
	EndSignal  End = "signal"  // the same, by SIGTERM
)

type minuteEntry struct {
	Kind string `json:"kind"`
	*Minute
}

// Minute is what is known of one minute's pauses. Times are nanoseconds.
type Minute struct {
	// Start is the minute by CLOCK_REALTIME, at which its pauses ended.
	Start time.Time `json:"start"`
	// Run names one life of a QEMU process. Pauses are numbered from 1 in each.
	Run string `json:"run"`
	// First and Last are the numbers of the pauses that the minute accounts for: Last-First+1 is Pauses and all Missed.
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// From and To are CLOCK_REALTIME at the first and the last cont.
	From int64 `json:"from_ns"`
	To   int64 `json:"to_ns"`

	Pauses uint64 `json:"pauses"`
	// Lost is what the pauses took in all, and stock QEMU would have taken from the guest's clock. Of it CaughtUp is what
	// the guest was given back, Held what it wasn't because the policy or a limit said so, and Passed what it wasn't
	// because of a doubt.
	Lost     uint64 `json:"lost_ns"`
	CaughtUp uint64 `json:"caught_up_ns"`
	Held     uint64 `json:"held_ns"`
	Passed   uint64 `json:"passed_ns"`

	// Residual is the kernel's clock less the anchor at each stop: how far the guest's clock was from where it should be.
	Residual Distribution `json:"residual"`
	// Cost is the time in the module at each cont.
	Cost      Distribution `json:"cost"`
	Decisions []Decision   `json:"decisions"`

	State     string            `json:"state"`     // control.State while they came
	Reference string            `json:"reference"` // "raw" or "utc"; empty while the policy only watches
	Host      control.HostClock `json:"host"`
	Missed    []Missed          `json:"missed,omitempty"`
	// MissedInRun is how many the record has missed since the run's first pause.
	MissedInRun uint64 `json:"missed_in_run"`
}

// Decision counts the pauses with which the same was done for the same reason.
type Decision struct {
	clockpage.Outcome
	Count uint64 `json:"count"`
	Lost  uint64 `json:"lost_ns"`
}

// Missed are pauses that are known by their numbers alone.
type Missed struct {
	Why   Why    `json:"why"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Count uint64 `json:"count"`
	// From and To are CLOCK_REALTIME, ns: they came after the one and before the other. From is 0 where that isn't known.
	From int64 `json:"from_ns"`
	To   int64 `json:"to_ns"`
}

// Why says why pauses are missing.
type Why string

// The values of Why.
const (
	// Overwritten: there were more than the module's ring holds before the shim looked.
	Overwritten Why = "overwritten"
	// Unreadable: the module's record was torn, gone, or out of bounds.
	Unreadable Why = "unreadable"
	// Unwritten: the minute couldn't be written to disk.
	Unwritten Why = "unwritten"
)

// Pause is one pause as the module recorded it.
type Pause struct {
	Run string
	clockpage.Record
}

// row is a pause's line of numbers in the file, in this order.
func row(b []byte, r *clockpage.Record) []byte {
	b = append(b, '[')
	for i, v := range [...]int64{int64(r.Number), int64(r.Decision), int64(r.Reason), int64(r.Event), int64(r.Ordered), int64(r.Flags),
		int64(r.Saved), int64(r.WentOn), int64(r.StopRaw), int64(r.ContRaw), int64(r.StopReal), int64(r.ContReal),
		r.Lost, r.ResidualStop, r.ResidualCont, int64(r.OrderLost), int64(r.Cost),
		int64(r.Error), int64(r.Slept), int64(r.TSC)} {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendInt(b, v)
	}
	return append(b, ']')
}

// fromRow is its inverse. More numbers than it knows are a later writer's.
func fromRow(v []int64) (r clockpage.Record, err error) {
	if len(v) < 19 {
		return r, fmt.Errorf("a pause has %d numbers, want 19", len(v))
	}
	r.Number, r.Decision, r.Reason = uint64(v[0]), clockpage.Decision(v[1]), clockpage.Reason(v[2])
	r.Event, r.Ordered, r.Flags = clockpage.Event(v[3]), clockpage.Flag8(v[4]), uint32(v[5])
	r.Saved, r.WentOn, r.StopRaw, r.ContRaw = uint64(v[6]), uint64(v[7]), uint64(v[8]), uint64(v[9])
	r.StopReal, r.ContReal = uint64(v[10]), uint64(v[11])
	r.Lost, r.ResidualStop, r.ResidualCont, r.OrderLost, r.Cost = v[12], v[13], v[14], uint64(v[15]), uint64(v[16])
	r.Error, r.Slept = uint64(v[17]), uint64(v[18])
	if len(v) > 19 {
		r.TSC = clockpage.TSC(v[19])
	}
	return r, nil
}

// bad says why a record can't be. It comes from QEMU's process.
func bad(r *clockpage.Record, now time.Time) error {
	const (
		long      = int64(10 * 365 * 24 * time.Hour)
		y2000     = 946_684_800_000_000_000
		aheadOfUs = time.Minute // the host's clock may have been stepped back in between
	)
	within := func(v, max int64) bool { return v >= -max && v <= max }
	switch {
	case r.Decision == 0 || r.Decision > 15 || r.Reason > 63 || r.Event > 15:
		return fmt.Errorf("decision %d for reason %d, event %d", r.Decision, r.Reason, r.Event)
	case r.ContReal < y2000 || r.ContReal > uint64(now.Add(aheadOfUs).UnixNano()):
		return fmt.Errorf("a cont at %d ns since 1970", r.ContReal)
	case r.StopReal > math.MaxInt64 || r.StopRaw > math.MaxInt64 || r.ContRaw > math.MaxInt64 || r.Saved > math.MaxInt64 || r.WentOn > math.MaxInt64:
		return errors.New("a reading that no clock gives")
	case r.Lost < 0 || r.Lost > long || r.OrderLost > uint64(long):
		return fmt.Errorf("%d ns lost", r.Lost)
	case !within(r.ResidualStop, long) || !within(r.ResidualCont, long):
		return fmt.Errorf("residuals of %d and %d ns", r.ResidualStop, r.ResidualCont)
	case r.Error > math.MaxInt64 || r.Slept > uint64(long):
		return fmt.Errorf("an error of %d ns, a sleep of %d ns", r.Error, r.Slept)
	case r.Cost > uint64(time.Hour):
		return fmt.Errorf("a cost of %d ns", r.Cost)
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An entry is a line: the CRC-32C of its JSON as eight hexadecimal digits, a space, the JSON, a newline.
func appendLine(b, text []byte) []byte {
	sum := crc32.Checksum(text, castagnoli)
	b = hex.AppendEncode(b, []byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)})
	b = append(b, ' ')
	b = append(b, text...)
	return append(b, '\n')
}

func appendEntry(b []byte, entry any) []byte {
	text, err := json.Marshal(entry)
	if err != nil {
		panic(err) // the types here all have a JSON
	}
	return appendLine(b, text)
}

// parseLine checks a line, without its newline, and gives its JSON.
func parseLine(line []byte) ([]byte, bool) {
	var sum [4]byte
	if len(line) < 11 || line[8] != ' ' {
		return nil, false
	}
	if _, err := hex.Decode(sum[:], line[:8]); err != nil {
		return nil, false
	}
	text := line[9:]
	want := crc32.Checksum(text, castagnoli)
	return text, bytes.Equal(sum[:], []byte{byte(want >> 24), byte(want >> 16), byte(want >> 8), byte(want)})
}

// uncorrected counts the minute's pauses that should have been caught up and weren't.
func (m *Minute) uncorrected() (n uint64) {
	for _, d := range m.Decisions {
		if d.Uncorrected() {
			n += d.Count
		}
	}
	return n
}

// merge adds another minute of the same run, a part of this one or the next.
func (m *Minute) merge(o *Minute) {
	m.First, m.Last = min(m.First, o.First), max(m.Last, o.Last)
	if o.Pauses > 0 && (m.Pauses == 0 || o.From < m.From) {
		m.From = o.From
	}
	m.To = max(m.To, o.To)
	m.Pauses += o.Pauses
	m.Lost, m.CaughtUp, m.Held, m.Passed = m.Lost+o.Lost, m.CaughtUp+o.CaughtUp, m.Held+o.Held, m.Passed+o.Passed
	m.Residual = m.Residual.Merge(o.Residual)
	m.Cost = m.Cost.Merge(o.Cost)
	m.Decisions = slices.Clone(m.Decisions)
	for _, d := range o.Decisions {
		m.Decisions = count(m.Decisions, d)
	}
	m.Host = m.Host.Merge(o.Host)
	m.Missed = append(slices.Clone(m.Missed), o.Missed...)
	m.MissedInRun = max(m.MissedInRun, o.MissedInRun)
}

// count adds to the decisions of the same kind.
func count(all []Decision, d Decision) []Decision {
	for i := range all {
		if a := &all[i]; a.Outcome == d.Outcome {
			a.Count, a.Lost = a.Count+d.Count, a.Lost+d.Lost
			return all
		}
	}
	return append(all, d)
}
