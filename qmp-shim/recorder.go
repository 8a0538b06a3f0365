package shim

import (
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/record"
)

const (
	// collectEvery is how often the record takes over what is new in the module's ring, while pauses come. A ring holds as
	// many pauses as 500 a second make in that time; with more, it is sooner.
	collectEvery = 500 * time.Millisecond
	collectSoon  = clockpage.RingLen / 2
	// collectLeast is between two looks: with it a ring holds as many pauses as 5,000 a second make.
	collectLeast = 50 * time.Millisecond
)

// A recorder keeps the domain's record. It has a goroutine of its own, so that neither a message nor a pause ever waits for
// the disk. The module fills its ring by itself; a message of QEMU's is an occasion to look whether something is new in there.
// If so, the ring is emptied now, and again after collectEvery until nothing was new. So nothing wakes up while nothing
// happens, but once at the end of a minute that had pauses, to write it down. Pauses of which the monitor shows nothing wait in the
// ring for the next occasion. Where there is no monitor to look at, the recorder looks by itself.
type recorder struct {
	domain *domain
	config record.Config
	alone  atomic.Bool // no monitor's messages wake it
	kick   chan struct{}
	seen   atomic.Uint64 // pauses that were taken over
	armed  atomic.Bool   // it will look again by itself

	mu   sync.Mutex
	book book
}

// A book is what a recorder keeps the record with.
type book struct {
	writer *record.Writer
	qemu   int // whose record writer keeps
	ended  bool
	open   bool      // the minute was, when it was looked at last
	unkept bool      // said so in the log
	held   uint64    // ns, said in the log
	heldAt time.Time // when
}

// lookAlone is how often it looks by itself. A ring holds as many pauses as 200 a second make in that time.
const lookAlone = time.Second

// statusWait bounds how long a status waits for what is being written.
const statusWait = 2 * time.Second

func newRecorder(d *domain, alone bool, c record.Config) *recorder {
	c.Problem = func(err error) {
		d.log.Warn().Err(err).Msg("the record of this clock isn't kept, the clock is all the same; fix the disk, and the record goes on by itself")
	}
	r := &recorder{domain: d, config: c, kick: make(chan struct{}, 1)}
	r.alone.Store(alone)
	return r
}

// setAlone says whether messages wake it, which is so for a relay unless nobody reads them.
func (r *recorder) setAlone(alone bool) {
	r.alone.Store(alone)
	r.wake()
}

// wake has the recorder look, soon. It never waits.
func (r *recorder) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// look wakes it if there are pauses that nobody is about to take over.
func (r *recorder) look(page *clockpage.Page) {
	if page == nil {
		return
	}
	if fresh := page.Counts().Pauses - r.seen.Load(); fresh != 0 && (!r.armed.Load() || fresh >= collectSoon) {
		r.wake()
	}
}

// run is the recorder's goroutine.
func (r *recorder) run() {
	timer := time.NewTimer(collectEvery)
	timer.Stop()
	var last time.Time
	for {
		select {
		case <-r.kick:
		case <-timer.C:
		}
		// However often a page says that its ring is full.
		time.Sleep(collectLeast - time.Since(last))
		last = time.Now()
		r.armed.Store(true)
		if r.collect() > 0 {
			timer.Reset(collectEvery)
			continue
		}
		r.armed.Store(false)
		// What came since then was told to nobody.
		if r.collect() > 0 {
			r.armed.Store(true)
			timer.Reset(collectEvery)
		} else if left := r.settle(); r.alone.Load() {
			timer.Reset(lookAlone)
		} else if left > 0 {
			timer.Reset(left)
		}
	}
}

// settle writes down a minute that is over, and gives how long one that isn't takes; 0 without one.
func (r *recorder) settle() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.book.writer == nil || r.book.ended {
		return 0
	}
	left := r.book.writer.SettleMinute()
	if r.book.open && left == 0 {
		debug.FreeOSMemory() // what its pauses have left behind is most of the heap
	}
	r.book.open = left > 0
	return left
}

// collect takes over what is new, and gives how many pauses that were.
func (r *recorder) collect() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.book.collect(r.domain, r.config, &r.seen)
}

// collect takes over what is new in the domain's ring, and gives how many pauses that were; seen is then what was taken over in all.
func (b *book) collect(d *domain, c record.Config, seen *atomic.Uint64) uint64 {
	v, qemu := d.view(), d.notes.read().QEMU
	if b.ended || v.state == control.Starting {
		return 0
	}
	if b.writer == nil || b.qemu != qemu {
		c.Run, c.Again = record.Run(qemu), b.writer != nil
		b.writer, b.qemu = record.NewWriter(c), qemu
	}
	if v.state == control.Unkept && !b.unkept {
		d.log.Warn().Msg("the guest has switched on no clock that ftclock keeps: have it read kvmclock, or Windows Hyper-V's reference time")
	}
	b.unkept = v.state == control.Unkept
	reference := ""
	if v.policy != nil {
		reference = v.policy.Reference.String()
	}
	b.writer.SetState(v.state, v.why, reference, v.without)
	if v.page == nil {
		return 0
	}
	d.host.check(v.policy, v.page, now()) // pauses that no monitor shows have bounds, too
	n := b.writer.Collect(v.page)
	b.tellHeld(d.log, v.page.Counts().HeldTime, time.Now())
	seen.Store(b.writer.Next() - 1)
	return n
}

// tellHeld has a line in the log for what was held in all, at most once a day: a policy that holds is easily forgotten.
func (b *book) tellHeld(log zerolog.Logger, held uint64, at time.Time) {
	if held <= b.held || at.Sub(b.heldAt) < 24*time.Hour {
		return
	}
	b.held, b.heldAt = held, at
	log.Warn().Dur("held_ms", time.Duration(min(held, math.MaxInt64))).
		Msg("pauses were held in all for so long, as the policy or a limit says: the guest's clock is behind by as much; do=\"catch-up\" or a longer limit gives them back")
}

// status takes over what is new, writes it, and tells of the record; nil where none was begun.
func (r *recorder) status() *control.RecordStatus {
	for end := time.Now().Add(statusWait); !r.mu.TryLock(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return &control.RecordStatus{Problem: "its disk doesn't answer"}
		}
	}
	defer r.mu.Unlock()
	r.book.collect(r.domain, r.config, &r.seen)
	if r.book.writer == nil {
		return nil
	}
	r.book.writer.Settle()
	return r.book.writer.Status()
}

// end closes the record.
func (r *recorder) end(why record.End) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.book.collect(r.domain, r.config, &r.seen)
	if r.book.writer != nil && !r.book.ended {
		r.book.writer.End(why)
	}
	r.book.ended = true
}
