package shim

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/relay"
	metadata "ftclock/xml-templates"
)

// busyWait bounds how long loading is tried while QEMU's main thread is busy, and how long a cont waits for that where the domain
// may not run without the module. Hundreds of GiB of memory that are pinned for a device take minutes. Tests are less patient.
var busyWait = 15 * time.Minute

// contWait bounds how long a cont is held until the module is loaded. Tests are less patient.
var contWait = 15 * time.Second

// loadWait bounds one attempt to load the module. It ends before a cont that waits for it gives up.
const loadWait = 10 * time.Second

// maxWarnings bounds what is kept for status.
const maxWarnings = 16

// A domain is what the shim knows of its domain: the policy, the module's page, and the pause that is on as the
// monitor shows it. It is the relay's observer.
type domain struct {
	log zerolog.Logger

	mu     sync.Mutex
	policy *metadata.Policy // nil: watch only
	page   *clockpage.Page  // nil: not loaded
	qemu   int
	method string
	state  control.State
	why    string
	// loading is closed when the attempt to load the module has ended; nil while none was begun, or after one that was
	// refused upon.
	loading chan struct{}
	// onlyThat says that a state that is loaded is caught up only if it is the one of the last stop.
	onlyThat bool
	isBusy   bool // the attempt goes on because QEMU's main thread is busy
	// load makes an attempt, and tells loaded. Set once, before the relay runs.
	load func()
	// look has somebody look whether the domain's metadata was changed, and doesn't wait; nil in tests. Set once, before
	// the relay runs.
	look func()
	// importState gives the module what a state that is loaded is caught up from; nil in tests. Set once, before the relay runs.
	importState func(*clockpage.Page)
	// gate is closed (true) until the first cont has gone through; only a gated cont can be refused.
	gate bool
	// save keeps what the next worker has to know. Called with mu held.
	save func(memory)
	// memory is what was saved last; what this struct has elsewhere is filled in by remember.
	memory memory

	pause pauseSeen
	host  hostSync

	// recorder keeps the record on disk; nil in tests. Set once, before the relay runs.
	recorder *recorder

	disagreements    uint64
	lastDisagreement string
	warnings         []string
}

// pauseSeen is one pause on the monitor. Times are CLOCK_MONOTONIC_RAW in ns; 0: not seen.
type pauseSeen struct {
	stopSent  uint64 // a stop went on to QEMU
	stopID    string // its id, until it is answered
	stopEvent uint64 // QEMU said STOP
	contID    string
	contCame  uint64
	number    uint64 // the module's number of the pause that the cont ends; 0: unknown
	ordered   bool   // an order was given for it
}

// newDomain begins with what m says, of a new domain or of an earlier worker's. The error is of m's policy.
func newDomain(log zerolog.Logger, m memory, save func(memory)) (*domain, error) {
	d := &domain{log: log, state: control.Starting, save: save, memory: m}
	if m.Clock != "" {
		p, err := metadata.ParseElement([]byte(m.Clock))
		if err != nil {
			return nil, err
		}
		d.policy = &p
	}
	d.gate = m.Gate && d.policy != nil && d.policy.Required
	d.qemu, d.method, d.why = m.QEMU, m.Method, m.Why
	d.disagreements, d.lastDisagreement, d.warnings = m.Problems.Disagreements, m.Problems.LastDisagreement, m.Problems.Warnings
	if d.why != "" {
		d.state = control.Uncorrected
		if !d.gate {
			d.loading = make(chan struct{})
			close(d.loading)
		}
	}
	return d, nil
}

// remember saves what the next worker has to know. The caller holds d.mu.
func (d *domain) remember() {
	m := &d.memory
	m.Clock, m.Gate, m.Why, m.Method, m.QEMU = "", d.gate, d.why, d.method, d.qemu
	if d.isBusy { // the next worker tries, too
		m.Why = ""
	}
	if d.policy != nil {
		m.Clock = d.policy.XML()
	}
	m.Problems = problems{d.disagreements, d.lastDisagreement, d.warnings}
	d.save(*m)
}

// resume takes over a page that an earlier worker opened, or begins what it didn't get to.
func (d *domain) resume(page *clockpage.Page, connected bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if page != nil {
		d.page, d.why = page, ""
		d.page.SetOrder(clockpage.Order{}) // the last worker may have died within one
		d.apply()
	} else if connected && d.loading == nil {
		d.begin()
	}
}

// now reads CLOCK_MONOTONIC_RAW, ns.
func now() uint64 { return clock(unix.CLOCK_MONOTONIC_RAW) }

// Holds: as long as a cont can be refused, and while cont would wait for the module.
func (d *domain) Holds() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gate {
		return true
	}
	if d.loading == nil {
		return d.page == nil // cont will begin an attempt
	}
	select {
	case <-d.loading:
		return false
	default:
		return true
	}
}

func (d *domain) Command(m relay.Message) {
	switch m.Execute {
	case "stop":
		t := now()
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.pause.stopEvent == 0 { // a stop of a guest that is paused already begins nothing
			d.pause.stopSent, d.pause.stopID = t, m.ID
		}
	case "snapshot-load":
		d.mu.Lock()
		defer d.mu.Unlock()
		d.loadsSnapshot()
	}
}

// loadsSnapshot: libvirt 10.10 and later revert to an internal snapshot by a QEMU that is started like any other, and told by
// the monitor to load it (qemuSnapshotInternalRevert). What the module had been given for a start is given anew then. The
// first cont waits for it. The caller holds d.mu.
func (d *domain) loadsSnapshot() {
	if d.memory.Loads || d.page != nil && d.page.Counts().Pauses > 0 {
		return // a QEMU that ran has an anchor of its own
	}
	d.memory.Loads = true
	d.remember()
	if d.page == nil && d.loading == nil {
		return // the attempt that is still to come will know
	}
	before, done := d.loading, make(chan struct{})
	d.loading = done
	go func() {
		defer close(done)
		if before != nil {
			<-before
		}
		d.mu.Lock()
		page := d.page
		d.mu.Unlock()
		if page != nil && d.importState != nil {
			d.importState(page)
		}
	}()
}

// Cont waits for the module, and gives it the order for the pause that ends.
func (d *domain) Cont(m relay.Message) (refusal string) {
	came := now()
	d.awaitModule()

	d.mu.Lock()
	defer d.mu.Unlock()
	if d.page == nil {
		if d.gate {
			d.loading = nil // the next cont finds a new attempt: who fixes the cause only has to resume again
			return "ftclock: the guest's clock can't be kept, and the domain's metadata requires it: " + d.why
		}
		return ""
	}
	if d.gate {
		d.gate = false
		d.remember()
	}
	d.pause.contID = m.ID
	d.pause.contCame = came
	d.pause.number, d.pause.ordered = 0, false
	d.checkHost(came)
	d.order()
	return ""
}

// connected says that a new connection begins: what was seen of a pause on the last one may be incomplete.
func (d *domain) connected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pause = pauseSeen{}
}

// awaitModule waits, bounded, while an attempt to load the module runs: for as long as QEMU is busy, where a cont without the
// module would be refused.
func (d *domain) awaitModule() {
	d.mu.Lock()
	if d.loading == nil && d.page == nil {
		d.begin()
	}
	loading := d.loading
	d.mu.Unlock()
	if loading == nil {
		return
	}
	select {
	case <-loading:
		return
	default:
	}
	began := time.Now()
	for {
		timer := time.NewTimer(contWait)
		select {
		case <-loading:
			timer.Stop()
			return
		case <-timer.C:
		}
		d.mu.Lock()
		patient := d.gate && d.isBusy && time.Since(began) < busyWait
		if !patient {
			d.why = fmt.Sprintf("loading the module took longer than %v", time.Since(began).Round(time.Second))
			d.warn("a cont goes on without the module: " + d.why + "; `ftclock status` tells when it is there")
		}
		d.mu.Unlock()
		if !patient {
			return
		}
	}
}

// order writes the order for the pause that the cont ends. The caller holds d.mu.
func (d *domain) order() {
	if d.policy == nil {
		return
	}
	module, err := d.page.Now()
	if err != nil {
		d.warn("the standing policy serves a pause: " + err.Error() + "; if it comes again, restart the domain")
		return
	}
	d.pause.number = module.Pause
	if module.Paused != 1 {
		return // a cont of a running guest, or one whose pause froze no clock, or the first one of a loaded state
	}
	stop := d.pause.stopEvent
	if stop == 0 {
		stop = d.pause.stopSent
	}
	order := clockpage.Order{Pause: module.Pause, StopRaw: stop, ContRaw: d.pause.contCame}
	if stop != 0 && d.pause.contCame >= stop {
		order.Lost = d.pause.contCame - stop
		order.Event, order.What = judge(d.policy, time.Duration(order.Lost))
	}
	d.page.SetOrder(order)
	d.pause.ordered = true
}

// judge says what the policy wants done with a pause that lasted for lost. The limits are the module's to keep.
func judge(p *metadata.Policy, lost time.Duration) (clockpage.Event, clockpage.Do) {
	if lost > p.Checkpoint.Limit {
		return clockpage.Suspend, pageDo(p.Suspend.Do)
	}
	return clockpage.Checkpoint, pageDo(p.Checkpoint.Do)
}

func (d *domain) FromQEMU(m relay.Message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer func() { d.recorder.look(d.page) }()
	switch {
	case m.Event == "STOP":
		d.pause.stopEvent = now()
		if d.pause.stopID == "" { // nobody waits for an answer
			d.lookBeside()
		}
	case (m.Answer || m.Failure) && d.pause.stopID != "" && m.ID == d.pause.stopID:
		d.pause.stopID = ""
		d.lookBeside() // not before: the answer that somebody waits for comes right behind the event
	case m.Event == "RESUME":
		if d.gate { // it runs by another monitor's cont: from now on no cont may be refused
			d.gate = false
			d.remember()
		}
		// The clock is written after this event; the answer to the cont comes later still. What a second monitor
		// or QEMU itself resumed has no answer here, and no bounds to check.
		if d.pause.contCame == 0 {
			d.pause = pauseSeen{}
		}
	case (m.Answer || m.Failure) && d.pause.contCame != 0 && m.ID == d.pause.contID:
		d.contAnswered(now(), m.Failure)
	case m.Greeting && d.loading == nil && d.page == nil:
		d.begin()
	}
}

// Unread tells of a libvirt that hangs, and has the record go on without the messages that would wake it.
func (d *domain) Unread(so bool) {
	d.recorder.setAlone(so)
	if so {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.warn("libvirt doesn't read what QEMU says: the guest and its clock go on, and virsh waits; see whether libvirtd (or virtqemud) is stopped or hangs")
	}
}

func (d *domain) lookBeside() {
	if d.look != nil {
		d.look()
	}
}

// begin starts the attempt to load the module. The caller holds d.mu.
func (d *domain) begin() {
	if d.load == nil {
		return
	}
	done := make(chan struct{})
	d.loading = done
	go func() {
		defer close(done)
		d.load()
	}()
}

// contAnswered compares what the module measured with what the monitor showed. Both sides read the same clock, so
// there are hard bounds and no tolerance: the guest's clock was read between the stop's going out and the STOP event's
// coming in, and written between the cont's coming and its answer. The caller holds d.mu.
func (d *domain) contAnswered(t uint64, failed bool) {
	seen := d.pause
	d.pause.contCame, d.pause.contID, d.pause.number, d.pause.ordered = 0, "", 0, false
	if failed {
		// The guest is still paused: an order for a cont that wasn't must not serve a later one.
		if seen.ordered {
			d.page.SetOrder(clockpage.Order{})
		}
		return
	}
	d.pause = pauseSeen{}
	if d.page == nil || seen.number == 0 {
		return
	}
	record, err := d.page.Record(seen.number)
	if err != nil {
		if seen.ordered && errors.Is(err, clockpage.ErrNotYet) {
			d.disagree(fmt.Sprintf("pause %d: the monitor showed a cont, the module no write of the clock", seen.number))
		}
		return
	}
	if problem := compare(record, seen, t); seen.ordered && problem != "" {
		d.disagree(fmt.Sprintf("pause %d: %s", seen.number, problem))
	}
	onlyThat := d.onlyThat
	d.onlyThat = false
	switch {
	case record.Reason == clockpage.First && onlyThat && d.catchesUp(clockpage.Restore):
		d.warn("the time that the guest was away isn't caught up: the clock of the state that was loaded isn't the one of the last stop on this host, and no " +
			"anchor came with it. It is an older state, or of a machine type of QEMU 2.8 or older: use a newer one, or set the guest's clock")
	case record.Reason == clockpage.OverLimit:
		d.warn(fmt.Sprintf("the clock was held over a pause longer than the limit of its event, %v: raise the limit in the metadata "+
			"if such pauses are to be caught up", known(record.Event)))
	case record.Decision == clockpage.Passed && record.Reason != clockpage.First && record.Event != clockpage.EventShort(clockpage.Start):
		d.warn(fmt.Sprintf("a pause wasn't caught up: %v; `ftclock status --records 256` shows which", known(record.Reason)))
	case record.TSC == clockpage.TSCUnmoved:
		d.warn("the guest's clock was caught up, but its TSC couldn't be moved with it: a guest that reads its time from the tsc clock " +
			"source is behind; set its clock, or have it use kvm-clock")
	}
}

// known is what an event or a reason is called. Of numbers that have no name there are too many to warn of each.
func known(what fmt.Stringer) string {
	if text := what.String(); !strings.HasPrefix(text, "unknown") {
		return text
	}
	return "something that this version doesn't know"
}

// compare checks a record against the pause that the monitor showed, whose cont was answered at t.
func compare(r clockpage.Record, seen pauseSeen, t uint64) string {
	if r.StopRaw == 0 {
		return "" // the module saw no stop: it was loaded while the guest was paused
	}
	if r.ContRaw < seen.contCame || r.ContRaw > t {
		return fmt.Sprintf("the module saw the cont %v after it came and %v before its answer",
			time.Duration(r.ContRaw-seen.contCame), time.Duration(t-r.ContRaw))
	}
	if seen.stopSent != 0 && r.Lost > int64(t-seen.stopSent) {
		return fmt.Sprintf("the module measured %v, from the stop to the cont's answer there were only %v",
			time.Duration(r.Lost), time.Duration(t-seen.stopSent))
	}
	// A guest that QEMU stopped itself, to migrate, dump or snapshot it, has its clock read once more after the STOP event
	// (hw/i386/kvm/clock.c, kvmclock_pre_save): only in a pause that a stop began is the first reading the last.
	if seen.stopSent != 0 && seen.stopEvent != 0 && r.Lost < int64(seen.contCame)-int64(seen.stopEvent) {
		return fmt.Sprintf("the module measured %v, from the STOP event to the cont there were already %v",
			time.Duration(r.Lost), time.Duration(seen.contCame-seen.stopEvent))
	}
	return ""
}

// disagree and warn note what status and the log have to say. The caller holds d.mu. What a warning says must not change with
// each pause.
func (d *domain) disagree(what string) {
	d.disagreements++
	d.lastDisagreement = what
	d.remember()
	if worthALine(d.disagreements) {
		d.log.Error().Uint64("disagreements", d.disagreements).Msg("the two measurements disagree: " + what +
			"; don't trust this clock, and run `ftclock doctor`")
	}
}

// worthALine picks the first of many events, the tenth, the hundredth and so on: the log has a line an event, never one a
// pause.
func worthALine(n uint64) bool {
	for n >= 10 && n%10 == 0 {
		n /= 10
	}
	return n == 1
}

// warn tells of each thing once.
func (d *domain) warn(what string) {
	if slices.Contains(d.warnings, what) {
		return
	}
	if len(d.warnings) == maxWarnings {
		d.warnings = d.warnings[1:]
	}
	d.warnings = append(d.warnings, what)
	d.remember()
	d.log.Warn().Msg(what)
}

// loaded ends an attempt: page is nil where it failed, and err says why.
func (d *domain) loaded(page *clockpage.Page, method string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.isBusy = false
	if err != nil {
		d.state, d.why = control.Uncorrected, err.Error()
		d.warn("the guest's clock isn't kept: " + d.why + "; fix that, then `ftclock enable --live` tries again")
	} else {
		d.page, d.method, d.why = page, method, ""
		d.apply()
		d.remember()
		d.log.Info().Str("method", method).Str("state", string(d.state)).Int("qemu", d.qemu).Msg("module loaded")
	}
	d.recorder.wake()
}

// busy says that loading is tried again.
func (d *domain) busy(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.isBusy {
		d.log.Info().Err(err).Msg("QEMU is busy: loading the module is tried again until it isn't")
	}
	d.isBusy, d.why = true, err.Error()
}

// setPolicy takes a new policy; nil: watch only.
func (d *domain) setPolicy(p *metadata.Policy) {
	d.mu.Lock()
	defer d.mu.Unlock()
	same := (p == nil) == (d.policy == nil) && (p == nil || p.XML() == d.policy.XML())
	d.policy = p
	if p == nil || !p.Required {
		d.gate = false
	}
	if d.page != nil {
		d.apply()
	}
	d.remember()
	if !same {
		d.log.Info().Str("state", string(d.state)).Msg("policy changed")
	}
	d.recorder.wake()
}

// direct says that the metadata wants the monitor left alone.
func (d *domain) direct() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.policy != nil && d.policy.Monitor == metadata.Direct
}

// apply writes the policy into the page. The caller holds d.mu.
func (d *domain) apply() {
	if d.policy == nil {
		d.page.SetPolicy(clockpage.Policy{})
		d.state = control.Watching
		return
	}
	p := d.policy
	d.page.SetPolicy(clockpage.Policy{
		Enabled:         1,
		Reference:       uint32(p.Reference),
		SlewPPM:         slewPPM(p),
		CheckpointDo:    pageDo(p.Checkpoint.Do),
		SuspendDo:       pageDo(p.Suspend.Do),
		RestoreDo:       pageDo(p.Restore.Do),
		MigrateDo:       pageDo(p.Migrate.Do),
		CheckpointLimit: uint64(p.Checkpoint.Limit),
		SuspendLimit:    uint64(p.Suspend.Limit),
		RestoreLimit:    uint64(p.Restore.Limit),
		MigrateLimit:    uint64(p.Migrate.Limit),
	})
	d.state = control.Correcting
}

func slewPPM(p *metadata.Policy) uint32 {
	if p.Slew == 0 {
		return metadata.DefaultSlew
	}
	return p.Slew
}

func pageDo(a metadata.Action) clockpage.Do {
	if a == metadata.CatchUp {
		return clockpage.CatchUp
	}
	return clockpage.Hold
}

// status fills in what the domain knows; records asks for so many of the newest records.
func (d *domain) status(s *control.Status, records int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.Why, s.Method, s.QEMU = d.why, d.method, d.qemu
	s.State, s.GuestClock, _ = d.kept()
	s.Disagreements, s.LastDisagreement = d.disagreements, d.lastDisagreement
	s.Warnings = append([]string(nil), d.warnings...)
	if d.policy != nil {
		s.Clock = d.policy.XML()
	}
	if d.page == nil {
		return
	}
	c := d.page.Counts()
	s.Pauses, s.Dropped, s.Anchored, s.Held, s.Passed = c.Pauses, c.Dropped, c.Anchored, c.Held, c.Passed
	s.OverLimit, s.Reanchored, s.Orders, s.StaleOrders, s.Busy = c.OverLimit, c.Reanchored, c.Orders, c.StaleOrders, c.Busy
	s.CaughtUp, s.HeldTime, s.WorstResidual, s.WorstCost = c.CaughtUp, c.HeldTime, c.WorstResidual, c.WorstCost
	if a, err := d.page.Anchor(); err == nil {
		s.Anchor = control.Anchor{
			Valid: a.Valid == 1, Epoch: a.Epoch, Clock: a.Clock, Raw: a.Raw, Real: a.Real, Boot: a.Boot,
			Steer: a.Steer, Error: a.Error, Slept: a.Slept,
		}
	}
	if f, err := d.page.Follow(); err == nil && f.Known == 1 {
		s.Follow = &control.Follow{
			Debt: f.Debt, Steered: f.Steered, Bases: f.Bases, Steps: f.Steps, LastStep: f.LastStep,
			GivenUp: f.GivenUp, LastGiven: f.LastGiven, Leaps: f.Leaps, Sleeps: f.Sleeps,
		}
	}
	if h, err := d.page.Host(); err == nil {
		s.Host = &control.Host{Synchronised: h.Synchronised == 1, AtRaw: h.AtRaw, Error: h.Error}
	}
	for _, r := range d.page.Last(records) {
		s.Records = append(s.Records, control.Record{
			Number: r.Number, Event: r.Event.String(), Decision: r.Decision.String(), Reason: r.Reason.String(),
			Ordered: r.Ordered == 1, Saved: r.Saved, WentOn: r.WentOn,
			StopRaw: r.StopRaw, ContRaw: r.ContRaw, StopReal: r.StopReal, ContReal: r.ContReal,
			Lost: r.Lost, OrderLost: r.OrderLost, ResidualStop: r.ResidualStop, ResidualCont: r.ResidualCont, Cost: r.Cost,
			Error: r.Error, Slept: r.Slept, TSC: movedTSC(r.TSC),
		})
	}
}

// movedTSC is empty for most pauses, which leave the guest's TSC alone.
func movedTSC(t clockpage.TSC) string {
	if t == clockpage.TSCLeft {
		return ""
	}
	return t.String()
}
