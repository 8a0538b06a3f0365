package shim

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/relay"
)

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

// now reads CLOCK_MONOTONIC_RAW, ns.
func now() uint64 { return clock(unix.CLOCK_MONOTONIC_RAW) }

// Holds says whether a cont has to be kept back.
func (d *domain) Holds() bool { return d.module.holds() }

// Command sees a stop, and that a snapshot is loaded.
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
		d.loadsSnapshot()
	}
}

// loadsSnapshot: libvirt 10.10 and later revert to an internal snapshot by a QEMU that is started like any other, and told by
// the monitor to load it (qemuSnapshotInternalRevert). What the module had been given for a start is given anew then. The
// first cont waits for it.
func (d *domain) loadsSnapshot() {
	page := d.view().page
	if d.notes.read().Loads || page != nil && page.Counts().Pauses > 0 {
		return // a QEMU that ran has an anchor of its own
	}
	d.notes.change(func(m *memory) { m.Loads = true })
	d.module.importAgain(d.importState)
}

// Cont waits for the module, and gives it the order for the pause that ends.
func (d *domain) Cont(m relay.Message) (refusal string) {
	came := now()
	there, refusal := d.module.admit()
	if !there {
		return refusal
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pause.contID = m.ID
	d.pause.contCame = came
	d.pause.number, d.pause.ordered = 0, false
	d.host.check(d.policy, d.page, came)
	if d.policy != nil {
		if err := d.pause.order(d.page); err != nil {
			d.notes.warn("the standing policy serves a pause: " + err.Error() + "; if it comes again, restart the domain")
		}
	}
	return ""
}

// connected says that a new connection begins: what was seen of a pause on the last one may be incomplete.
func (d *domain) connected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pause = pauseSeen{}
}

// order writes the order for the pause that the cont ends: when that was, and for how long. What is done with it is the module's to
// decide, by its own measure and the standing policy.
func (p *pauseSeen) order(page *clockpage.Page) error {
	module, err := page.Now()
	if err != nil {
		return err
	}
	p.number = module.Pause
	if module.Paused != 1 {
		return nil // a cont of a running guest, or one whose pause froze no clock, or the first one of a loaded state
	}
	stop := p.stopEvent
	if stop == 0 {
		stop = p.stopSent
	}
	order := clockpage.Order{Pause: module.Pause, StopRaw: stop, ContRaw: p.contCame}
	if stop != 0 && p.contCame >= stop {
		order.Lost = p.contCame - stop
	}
	page.SetOrder(order)
	p.ordered = true
	return nil
}

// FromQEMU sees what a pause begins and ends with.
func (d *domain) FromQEMU(m relay.Message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer func() { d.recorder.look(d.page) }()
	answers := func(id string) bool { return (m.Answer || m.Failure) && m.ID == id }
	switch {
	case m.Event == "STOP":
		d.pause.stopEvent = now()
		if d.pause.stopID == "" { // nobody waits for an answer
			d.look()
		}
	case d.pause.stopID != "" && answers(d.pause.stopID):
		d.pause.stopID = ""
		d.look() // not before: the answer that somebody waits for comes right behind the event
	case m.Event == "RESUME":
		d.module.open() // it runs, maybe by another monitor's cont
		// The clock is written after this event; the answer to the cont comes later still. What a second monitor
		// or QEMU itself resumed has no answer here, and no bounds to check.
		if d.pause.contCame == 0 {
			d.pause = pauseSeen{}
		}
	case d.pause.contCame != 0 && answers(d.pause.contID):
		seen := d.pause
		if d.pause = (pauseSeen{}); m.Failure { // an order for a cont that wasn't must not serve a later one
			if seen.ordered {
				d.page.SetOrder(clockpage.Order{})
			}
			d.pause.stopSent, d.pause.stopID, d.pause.stopEvent = seen.stopSent, seen.stopID, seen.stopEvent
		} else if r, ok := seen.record(d.page, d.notes, now()); ok {
			tell(d.notes, r, d.onlyThat && catchesUp(d.policy, clockpage.Restore))
			d.onlyThat = false
		}
	case m.Greeting:
		d.module.begin(false)
	}
}

// Unread tells of a libvirt that hangs, and has the record go on without the messages that would wake it.
func (d *domain) Unread(so bool) {
	d.recorder.setAlone(so)
	if so {
		d.notes.warn("libvirt doesn't read what QEMU says: the guest and its clock go on, and virsh waits; see whether libvirtd (or virtqemud) is stopped or hangs")
	}
}

// record gives the module's record of a pause whose cont was answered at t, and compares what the module measured with what the
// monitor showed; ok is false without one. Both sides read the same clock, so there are hard bounds and no tolerance: the guest's clock was
// read between the stop's going out and the STOP event's coming in, and written between the cont's coming and its answer.
func (p pauseSeen) record(page *clockpage.Page, notes *notebook, t uint64) (r clockpage.Record, ok bool) {
	if page == nil || p.number == 0 {
		return r, false
	}
	r, err := page.Record(p.number)
	if err != nil {
		if p.ordered && errors.Is(err, clockpage.ErrNotYet) {
			notes.disagree(fmt.Sprintf("pause %d: the monitor showed a cont, the module no write of the clock", p.number))
		}
		return r, false
	}
	if problem := compare(r, p, t); p.ordered && problem != "" {
		notes.disagree(fmt.Sprintf("pause %d: %s", p.number, problem))
	}
	return r, true
}

// tell warns of a pause that wasn't caught up. onlyThat says that a state that was loaded was to be, if it was that of the last stop.
func tell(notes *notebook, r clockpage.Record, onlyThat bool) {
	switch {
	case r.Reason == clockpage.First && onlyThat:
		notes.warn("the time that the guest was away isn't caught up: the clock of the state that was loaded isn't the one of the last stop on this host, and no " +
			"anchor came with it. It is an older state, or of a machine type of QEMU 2.8 or older: use a newer one, or set the guest's clock")
	case r.Reason == clockpage.OverLimit:
		notes.warn(fmt.Sprintf("the clock was held over a pause longer than the limit of its event, %v: raise the limit in the metadata "+
			"if such pauses are to be caught up", known(r.Event)))
	case r.InDoubt():
		notes.warn(fmt.Sprintf("a pause wasn't caught up: %v; `ftclock status --records 256` shows which", known(r.Reason)))
	case r.TSC == clockpage.TSCUnmoved:
		notes.warn("the guest's clock was caught up, but its TSC couldn't be moved with it: a guest that reads its time from the tsc clock " +
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
