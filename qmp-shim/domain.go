package shim

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// heard is told what an attempt to load the module came to: its page and how it was loaded, or why it wasn't.
type heard func(page *clockpage.Page, method string, err error)

// A domain is what the shim knows of its domain: the policy, the module's page, and the pause that is on as the
// monitor shows it. It is the relay's observer.
type domain struct {
	log    zerolog.Logger
	notes  *notebook
	module module
	host   hostSync

	// All set once, before the relay runs.

	// load makes an attempt to load the module. Behind the answer it gives it what a loaded guest is caught up from.
	load func(heard)
	// look has somebody look whether the domain's metadata was changed, and doesn't wait.
	look func()
	// importState gives the module what a state that is loaded is caught up from.
	importState func()
	// recorder keeps the record on disk.
	recorder *recorder

	mu     sync.Mutex
	policy *metadata.Policy // nil: watch only
	page   *clockpage.Page  // nil: the module isn't loaded
	pause  pauseSeen
	// onlyThat says that a state that is loaded is caught up only if it is the one of the last stop.
	onlyThat bool
}

// newDomain begins with what m says, of a new domain or of an earlier worker's. The error is of m's policy.
func newDomain(log zerolog.Logger, m memory, save func(memory)) (*domain, error) {
	d := &domain{log: log, load: func(heard) {}, look: func() {}, importState: func() {}}
	if m.Clock != "" {
		p, err := metadata.ParseElement([]byte(m.Clock))
		if err != nil {
			return nil, err
		}
		d.policy = &p
	}
	m.Gate = m.Gate && d.policy != nil && d.policy.Required
	d.notes = &notebook{log: log, save: save, m: m}
	d.host.notes = d.notes
	d.module = module{notes: d.notes, attempt: d.attempt, why: m.Why, gate: m.Gate}
	if m.Why != "" {
		d.module.state = loading.after(attemptFails)
		if m.Gate { // nothing runs yet: the next cont tries again
			d.module.state = failed.after(contRefused)
		}
	}
	d.recorder = newRecorder(d, false, record.Config{})
	save(m)
	return d, nil
}

// resume takes over a page that an earlier worker opened, or begins what it didn't get to.
func (d *domain) resume(page *clockpage.Page, connected bool) {
	if page != nil {
		page.SetOrder(clockpage.Order{}) // the last worker may have died within one
		d.adopt(page, d.notes.read().Method)
	} else if connected {
		d.module.begin(false)
	}
}

// adopt gives a module its policy, and has it serve.
func (d *domain) adopt(page *clockpage.Page, method string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.page = page
	page.SetPolicy(pagePolicy(d.policy))
	d.module.arrived(method)
}

// attempt is one attempt to load the module.
func (d *domain) attempt(run chan struct{}) {
	d.load(func(page *clockpage.Page, method string, err error) {
		if err != nil {
			d.module.failed(run, err)
			d.notes.warn("the guest's clock isn't kept: " + err.Error() + "; fix that, then `ftclock enable --live` tries again")
		} else {
			d.adopt(page, method)
			d.log.Info().Str("method", method).Str("state", string(d.view().state)).Int("qemu", d.notes.read().QEMU).Msg("module loaded")
		}
		d.recorder.wake()
	})
}

// setPolicy takes a new policy; nil: watch only.
func (d *domain) setPolicy(p *metadata.Policy) {
	d.mu.Lock()
	before := d.policy
	d.policy = p
	if p == nil || !p.Required {
		d.module.open()
	}
	if d.page != nil {
		d.page.SetPolicy(pagePolicy(p))
	}
	d.notes.change(func(m *memory) { m.Clock = clockXML(p) })
	d.mu.Unlock()
	if clockXML(p) != clockXML(before) {
		d.log.Info().Str("state", string(d.view().state)).Msg("policy changed")
	}
	d.recorder.wake()
}

// clockXML is a policy as XML; "" watches only.
func clockXML(p *metadata.Policy) string {
	if p == nil {
		return ""
	}
	return p.XML()
}

// pagePolicy is a policy as the module reads it.
func pagePolicy(p *metadata.Policy) clockpage.Policy {
	if p == nil {
		return clockpage.Policy{}
	}
	return clockpage.Policy{
		Enabled:         1,
		Reference:       uint32(p.Reference),
		SlewPPM:         cmp.Or(p.Slew, metadata.DefaultSlew),
		CheckpointDo:    pageDo(p.Checkpoint.Do),
		SuspendDo:       pageDo(p.Suspend.Do),
		RestoreDo:       pageDo(p.Restore.Do),
		MigrateDo:       pageDo(p.Migrate.Do),
		CheckpointLimit: uint64(p.Checkpoint.Limit),
		SuspendLimit:    uint64(p.Suspend.Limit),
		RestoreLimit:    uint64(p.Restore.Limit),
		MigrateLimit:    uint64(p.Migrate.Limit),
	}
}

func pageDo(a metadata.Action) clockpage.Do {
	if a == metadata.CatchUp {
		return clockpage.CatchUp
	}
	return clockpage.Hold
}

// A view is a domain as others see it, at one time.
type view struct {
	policy     *metadata.Policy
	page       *clockpage.Page
	state      control.State // how its clock is kept, given what the guest has switched on
	why        string        // it isn't
	guestClock control.GuestClock
	without    time.Duration // of Unkept: for how long it has run so
}

func (d *domain) view() view {
	d.mu.Lock()
	state, why, _ := d.module.now()
	v := view{policy: d.policy, page: d.page, state: control.Starting, why: why}
	d.mu.Unlock()
	switch {
	case v.page == nil && (state == failed || state == refused || state == retrying):
		v.state = control.Uncorrected
	case v.page == nil:
	case v.policy == nil:
		v.state = control.Watching
	default:
		v.state = control.Correcting
	}
	if v.page != nil {
		v.guestClock, v.without = guestClock(v.page)
		if v.state == control.Correcting && v.guestClock == control.NoClock {
			v.state = control.Unkept
		}
		if why := inDoubt(v.page); why != "" && v.state == control.Correcting {
			v.state, v.why = control.Uncorrected, why
		}
	}
	return v
}

// inDoubt says why the next pause is likely to go through uncorrected, as the last one did: there is no anchor to judge it by, or the
// last three did. "": it isn't.
func inDoubt(page *clockpage.Page) string {
	const several = 3
	last := page.Last(several)
	n := 0
	for _, r := range slices.Backward(last) {
		if !r.InDoubt() {
			break
		}
		n++
	}
	if a, err := page.Anchor(); n == 0 || n < several && (err != nil || a.Valid == 1) {
		return ""
	}
	return "its pauses go through uncorrected: " + last[len(last)-1].Reason.String()
}

// guestClock words what the module saw that the guest has switched on; for NoClock, it has run without for so long.
func guestClock(page *clockpage.Page) (control.GuestClock, time.Duration) {
	seen, err := page.Clocks()
	if err != nil {
		if h, err := page.Head(); err == nil && h.Minor < 2 {
			return control.ClockOldModule, 0
		}
		return control.ClockNotSeen, 0
	}
	switch without := time.Duration(min(seen.Without, uint64(time.Hour))); {
	case seen.On >= clockpage.ClockNotKnown:
		return control.ClockNotKnown, 0
	case seen.On&clockpage.KVMClock != 0:
		return control.KVMClock, 0
	case seen.On&clockpage.HyperVPage != 0:
		return control.HyperVPage, 0
	case seen.On&clockpage.HyperVCounter != 0:
		return control.HyperVCounter, 0
	case without < control.UnkeptAfter:
		return control.NoClockYet, 0
	default:
		return control.NoClock, without
	}
}

// status fills in what the domain knows; records asks for so many of the newest records.
func (d *domain) status(s *control.Status, records int) {
	v, m := d.view(), d.notes.read()
	s.State, s.GuestClock, s.Why, s.Clock = v.state, v.guestClock, v.why, clockXML(v.policy)
	s.Method, s.QEMU, s.Workers, s.Since = m.Method, m.QEMU, m.Workers, m.Since
	s.Disagreements, s.LastDisagreement = m.Problems.Disagreements, m.Problems.LastDisagreement
	s.Warnings = slices.Clone(m.Problems.Warnings)
	if v.page == nil {
		return
	}
	s.Counts, s.Records = v.page.Counts(), v.page.Last(records)
	if a, err := v.page.Anchor(); err == nil {
		s.Anchor = a
	}
	if f, err := v.page.Follow(); err == nil && f.Known == 1 {
		s.Follow = &f
	}
	if h, err := v.page.Host(); err == nil {
		s.Host = &h
	}
}
