package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"libvirt.org/go/libvirt"

	"ftclock/control"
)

type exerciseCmd struct {
	Domain string  `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Rate   float64 `required:"" placeholder:"HZ" help:"Pauses a second."`
	Pause  float64 `required:"" placeholder:"MS" help:"Length of a pause in ms."`
	Count  int     `required:"" placeholder:"N" help:"Number of pauses."`
}

func (exerciseCmd) Help() string {
	return "Suspends and resumes the domain through libvirt, like `virsh suspend` and `virsh resume`. However it ends, the " +
		"domain is left running."
}

// check refuses what no engine does.
func (c *exerciseCmd) check() error {
	// NaN is in none of these ranges.
	switch {
	case !(c.Rate > 0 && c.Rate <= 1000):
		return fmt.Errorf("--rate %g: want more than 0 and at most 1000 pauses a second", c.Rate)
	case !(c.Pause > 0 && c.Pause <= 60_000):
		return fmt.Errorf("--pause %g: want more than 0 and at most 60000 ms", c.Pause)
	case c.Count < 1 || c.Count > 10_000_000:
		return fmt.Errorf("--count %d: want 1 to 10000000 pauses", c.Count)
	case c.Rate*c.Pause >= 1000:
		return fmt.Errorf("%g pauses a second of %g ms leave the guest no time to run", c.Rate, c.Pause)
	}
	return nil
}

func (c *exerciseCmd) Run(p *program) error {
	if err := c.check(); err != nil {
		return hinted(err, "a checkpointing engine makes 5 to 200 pauses a second, of some ms each")
	}
	h, err := connect(p.uri)
	if err != nil {
		return err
	}
	defer h.close()
	d, err := h.findRunning(c.Domain)
	if err != nil {
		return err
	}
	defer d.free()

	watch := newWatcher(d.uuid, isLocal(h.uri) || h.isTest())
	bar := c.bar(p.ui, d.name)
	e := &engine{domain: d.Domain, resumer: func() error { return resumeAgain(p.uri, d.uuid) }}
	failed := c.drive(p.ctx, e, func() {
		_ = bar.Add(1)
		watch.pauses++
		if watch.pauses%keepUp == 0 {
			watch.collect()
		}
	})
	_ = bar.Exit()

	c.report(p, d.name, e.sums)
	watch.report(p, d.name, e.sums)
	if failed != nil {
		return failed
	}
	if p.ctx.Err() != nil {
		return fmt.Errorf("interrupted after %s of %d, %s is running", count(uint64(e.sums.pauses), "pause"), c.Count, d.name)
	}
	return nil
}

// drive makes the pauses, and calls done after each. An interruption ends it early and is no error.
func (c *exerciseCmd) drive(ctx context.Context, e *engine, done func()) error {
	period := time.Duration(float64(time.Second) / c.Rate)
	pause := time.Duration(c.Pause * float64(time.Millisecond))
	e.sums.began = time.Now()
	next := e.sums.began
	for range c.Count {
		sleep(ctx, time.Until(next))
		if ctx.Err() != nil {
			break
		}
		if err := e.pause(ctx, pause); err != nil {
			return err
		}
		done()
		// A host that can't keep the rate up gets no burst afterwards.
		if next = next.Add(period); time.Since(next) > period {
			next = time.Now()
			e.sums.late++
		}
	}
	e.sums.took = time.Since(e.sums.began)
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// pausable is the part of a domain that the exercise uses.
type pausable interface {
	Suspend() error
	Resume() error
	GetState() (libvirt.DomainState, int, error)
}

// engine pauses and resumes.
type engine struct {
	domain  pausable
	resumer func() error // resumes by other means, when domain's connection is of no use any more
	sums    sums
}

// sums are what is seen from here. A pause begins within the call that suspends and ends within the one that resumes:
// the guest was paused at least shortest and at most longest.
type sums struct {
	pauses            int
	shortest, longest time.Duration
	began             time.Time
	took              time.Duration
	late              int // pauses that came too late for the rate
}

// pause makes one pause. Whatever happens, it tries to leave the domain running.
func (e *engine) pause(ctx context.Context, length time.Duration) error {
	asked := time.Now()
	if err := e.domain.Suspend(); err != nil {
		err = fmt.Errorf("suspending: %w", err)
		if state, _, unsure := e.domain.GetState(); unsure == nil && state != libvirt.DOMAIN_PAUSED {
			return err
		}
		return errors.Join(err, e.resume())
	}
	paused := time.Now()
	resumed := false
	defer func() { // a panic must not leave the domain paused
		if !resumed {
			_ = e.resume()
		}
	}()
	sleep(ctx, length)
	resuming := time.Now()
	resumed = true
	if err := e.resume(); err != nil {
		return err
	}
	e.sums.pauses++
	e.sums.shortest += resuming.Sub(paused)
	e.sums.longest += time.Since(asked)
	return nil
}

// resume makes the domain run, or sees that it does. It doesn't end with the interruption that may have led to it.
func (e *engine) resume() error {
	err := e.domain.Resume()
	if err == nil {
		return nil
	}
	if state, _, asked := e.domain.GetState(); asked == nil && state != libvirt.DOMAIN_PAUSED {
		return fmt.Errorf("resuming: somebody else has, or the domain has ended: %w", err)
	}
	for range 5 {
		if again := e.resumer(); again == nil {
			return fmt.Errorf("resuming took a second connection: %w", err)
		}
		time.Sleep(time.Second)
	}
	return hinted(fmt.Errorf("resuming, THE DOMAIN MAY STILL BE PAUSED: %w", err), "`virsh resume` it")
}

func resumeAgain(uri, uuid string) error {
	h, err := connect(uri)
	if err != nil {
		return err
	}
	defer h.close()
	d, err := h.find(uuid)
	if err != nil {
		return err
	}
	defer d.free()
	if state, _, err := d.GetState(); err == nil && state != libvirt.DOMAIN_PAUSED {
		return nil
	}
	return d.Resume()
}

// bar is a progress bar on a terminal, and nothing elsewhere.
func (c *exerciseCmd) bar(u *ui, name string) *progressbar.ProgressBar {
	w := io.Discard
	if u.progress {
		w = u.stderr
	}
	return progressbar.NewOptions(c.Count,
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetVisibility(u.progress),
		progressbar.OptionSetDescription(shorten(oneLine(name), 24)),
		progressbar.OptionSetWidth(30),
		progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)
}

func (c *exerciseCmd) report(p *program, name string, s sums) {
	p.printf("%s: %s in %s, the guest was paused %s to %s in all\n", name, count(uint64(s.pauses), "pause"),
		sayNS(uint64(s.took)), sayNS(uint64(s.shortest)), sayNS(uint64(s.longest)))
	if s.late > 0 {
		p.warn("this host didn't keep up %g pauses a second: %d of the pauses came late; give a lower --rate, or see what else it is busy with", c.Rate, s.late)
	}
}

// keepUp is after how many pauses the records are fetched: the module keeps the newest 256.
const keepUp = 128

// watcher follows what the domain's shim says during the exercise.
type watcher struct {
	uuid    string
	why     string // no shim says anything, and why
	stock   bool   // because there is none: the clock is QEMU's own affair
	before  control.Status
	after   control.Status
	records []control.Record
	pauses  int
}

// newWatcher takes the status before the first pause.
func newWatcher(uuid string, local bool) *watcher {
	w := &watcher{uuid: uuid}
	if !local {
		w.why = "its shim, if there is one, is on another host"
		return w
	}
	w.before = w.ask()
	w.after = w.before
	return w
}

func (w *watcher) ask() control.Status {
	answer, err := control.Ask(shims, w.uuid, control.Request{Do: "status", Records: 256})
	switch {
	case err == nil && answer.Status != nil:
		return *answer.Status
	case err == nil:
		w.why = "its shim answers without a status"
	case errors.Is(err, os.ErrNotExist):
		w.why, w.stock = "no shim serves it", true
	default:
		w.why = sayError(err)
	}
	return control.Status{}
}

// collect takes the status now, and the records that are new.
func (w *watcher) collect() {
	if w.why != "" {
		return
	}
	now := w.ask()
	if w.why != "" {
		return
	}
	for _, r := range now.Records {
		if r.Number > w.after.Pauses && r.Number > w.before.Pauses {
			w.records = append(w.records, r)
		}
	}
	w.after = now
}

// report says how the clock was kept.
func (w *watcher) report(p *program, name string, s sums) {
	w.collect()
	if w.stock {
		p.printf("%s: %s; QEMU by itself takes the sum of all pauses from the guest's clock: %s to %s\n", name, w.why,
			sayNS(uint64(s.shortest)), sayNS(uint64(s.longest)))
		return
	}
	if w.why != "" {
		p.printf("%s: how the clock was kept isn't known: %s\n", name, w.why)
		return
	}
	for _, line := range compare(w.before, w.after, w.records) {
		p.printf("%-16s %s\n", line[0], line[1])
	}
}

// compare tells the difference between two statuses, with the records of between.
func compare(before, after control.Status, records []control.Record) [][2]string {
	difference := control.Status{
		Pauses:   after.Pauses - before.Pauses,
		Dropped:  after.Dropped - before.Dropped,
		Anchored: after.Anchored - before.Anchored,
		Held:     after.Held - before.Held,
		Passed:   after.Passed - before.Passed,
	}
	lines := [][2]string{
		{"state", oneLine(string(after.State))},
		{"pauses", pausesInAll(difference)},
		{"caught up", sayNS(after.CaughtUp - before.CaughtUp)},
	}
	add := func(name, value string) { lines = append(lines, [2]string{name, value}) }
	if lost, ok := notCaughtUp(records); ok {
		add("lost", signedNS(lost))
	}
	if len(records) > 0 {
		add("worst residual", sayNS(worstResidual(records)))
		median, worst := costs(records)
		add("cost", fmt.Sprintf("median %s, worst %s", sayNS(median), sayNS(worst)))
	}
	if missing := difference.Pauses - min(difference.Pauses, uint64(len(records))); missing > 0 {
		add("not recorded", count(missing, "pause"))
	}
	add("errors", mishaps(before, after, difference.Passed))
	return lines
}

// notCaughtUp sums what the guest's clock lost at pauses that were neither dropped nor anchored.
func notCaughtUp(records []control.Record) (lost int64, any bool) {
	for _, r := range records {
		if r.Decision == "held" || r.Decision == "passed" {
			lost, any = lost+r.Lost, true
		}
	}
	return lost, any
}

func worstResidual(records []control.Record) uint64 {
	var worst uint64
	for _, r := range records {
		size := uint64(r.ResidualStop)
		if r.ResidualStop < 0 {
			size = -size
		}
		worst = max(worst, size)
	}
	return worst
}

// costs are the median and the largest time that the module took at a cont.
func costs(records []control.Record) (median, worst uint64) {
	sorted := make([]uint64, len(records))
	for i, r := range records {
		sorted[i] = r.Cost
	}
	slices.Sort(sorted)
	return sorted[len(sorted)/2], sorted[len(sorted)-1]
}

func mishaps(before, after control.Status, passed uint64) string {
	var found []string
	for _, m := range []struct {
		n    uint64
		what string
	}{
		{passed, "passed in doubt"},
		{after.OverLimit - before.OverLimit, "over limit"},
		{after.Reanchored - before.Reanchored, "anchored anew"},
		{after.StaleOrders - before.StaleOrders, "stale orders"},
		{after.Busy - before.Busy, "concurrent calls"},
		{after.Disagreements - before.Disagreements, "disagreements"},
	} {
		if m.n > 0 {
			found = append(found, fmt.Sprintf("%d %s", m.n, m.what))
		}
	}
	if after.Disagreements > before.Disagreements && after.LastDisagreement != "" {
		found = append(found, oneLine(after.LastDisagreement))
	}
	if len(found) == 0 {
		return "none"
	}
	return strings.Join(found, ", ")
}
