// Package history makes records of domains for tests and pictures: with the real writer, of pauses that never were, on a clock
// of its own.
package history

import (
	"os"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/record"
)

// History is a domain's past. It is used from one goroutine.
type History struct {
	At   time.Time // its clock
	Host control.HostClock
	// Change, if there is one, may alter each pause before it happens.
	Change func(*clockpage.Record)

	config  record.Config
	page    ring
	writer  *record.Writer
	numbers uint64 // of pauses ever, for a little variety
}

// New begins a record below dir, which it makes. The policy's reference is "raw" or "utc".
func New(dir, uuid, name string, begin time.Time, reference string) *History {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		panic(err)
	}
	h := &History{At: begin, Host: control.HostClock{Samples: 1, Synchronised: true, Offset: 4_000, EstimatedError: 9_000, MaximumError: 41_000}}
	h.config = record.Config{Dir: dir, UUID: uuid, Name: name, Shim: "history", Now: func() time.Time { return h.At },
		Problem:   func(err error) { panic(err) },
		HostClock: func() (control.HostClock, error) { return h.Host, nil }}
	h.Boot("history-1", reference)
	return h
}

// Boot starts a new QEMU, which run names.
func (h *History) Boot(run, reference string) {
	h.page = ring{records: map[uint64]clockpage.Record{}}
	h.config.Run = run
	h.Shim(reference)
}

// Shim starts a shim of the same QEMU.
func (h *History) Shim(reference string) {
	h.config.Worker = 1
	h.writer = record.NewWriter(h.config)
	h.State(control.Correcting, reference)
}

// State says how the clock is kept from now on.
func (h *History) State(s control.State, reference string) { h.writer.SetState(s, "", reference, 0) }

// Unseen lets the guest be paused without anybody who looks.
func (h *History) Unseen(n int, every time.Duration) {
	for range n {
		h.At = h.At.Add(every)
		h.numbers++
		h.page.newest++
		i := int64(h.numbers)
		r := clockpage.Record{Number: h.page.newest, Saved: 1, WentOn: 1, StopRaw: 1, ContRaw: 2, StopReal: uint64(h.At.UnixNano()) - 5e6,
			ContReal: uint64(h.At.UnixNano()), Lost: 5_000_000 + i*7919%400_000, ResidualStop: i*i*31%171 - 40 + i*13%29, ResidualCont: 3,
			Cost: 900 + uint64(i)%50, Ordered: 1,
			Outcome: clockpage.Outcome{Decision: clockpage.Dropped, Reason: clockpage.InTolerance, Event: clockpage.Checkpoint}}
		if h.Change != nil {
			h.Change(&r)
		}
		h.page.records[r.Number] = r
		delete(h.page.records, r.Number-2*clockpage.RingLen)
	}
}

// Look has the shim take the pauses over.
func (h *History) Look() { h.writer.Collect(&h.page) }

// Minutes lets the guest be paused so many times in each of n minutes, with a shim that looks in time.
func (h *History) Minutes(n, pauses int) {
	for range n {
		for left := pauses; left > 0; left -= clockpage.RingLen / 2 {
			h.Unseen(min(left, clockpage.RingLen/2), time.Minute/time.Duration(pauses))
			h.Look()
		}
	}
}

// End ends the shim; nobody is there any more.
func (h *History) End(why record.End) { h.writer.End(why) }

// ring is a module's page, as far as a writer sees it.
type ring struct {
	newest  uint64
	records map[uint64]clockpage.Record
}

func (r *ring) Counts() clockpage.Counts { return clockpage.Counts{Pauses: r.newest} }

func (r *ring) Record(n uint64) (clockpage.Record, error) {
	if n+clockpage.RingLen <= r.newest {
		return clockpage.Record{}, clockpage.ErrStale
	}
	return r.records[n], nil
}
