package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/engine"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

type exerciseCmd struct {
	Domain string  `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Rate   float64 `required:"" placeholder:"HZ" help:"Pauses a second."`
	Pause  float64 `required:"" placeholder:"MS" help:"Length of a pause in ms."`
	Count  int     `required:"" placeholder:"N" help:"Number of pauses."`
}

func (exerciseCmd) Help() string {
	return "Suspends and resumes the domain through libvirt, like `virsh suspend` and `virsh resume`. The domain is left running, " +
		"also after an error or an interruption."
}

// check refuses values that no checkpoint engine uses.
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
		return ui.Hinted(err, "a checkpointing engine makes 5 to 200 pauses a second, of some ms each")
	}
	d, err := hypervisor.OpenRunning(p.uri(), c.Domain)
	if err != nil {
		return err
	}
	defer d.Close()

	watch := newWatcher(p.dirs, d.UUID, d.Host.Local() || d.Host.IsTest())
	bar := c.bar(p.UI, d.Name)
	e := engine.New(d)
	period, length := time.Duration(float64(time.Second)/c.Rate), time.Duration(c.Pause*float64(time.Millisecond))
	failed := e.Drive(p.ctx, period, length, c.Count, func() {
		_ = bar.Add(1)
		watch.pauses++
		if watch.pauses%keepUp == 0 {
			watch.collect()
		}
	})
	_ = bar.Exit()

	c.report(p, d.Name, e.Sums)
	watch.report(p, d.Name, e.Sums)
	if failed != nil {
		return failed
	}
	if p.ctx.Err() != nil {
		return fmt.Errorf("interrupted after %s of %d, %s is running", ui.Count(uint64(e.Sums.Pauses), "pause"), c.Count, d.Name)
	}
	return nil
}

// bar is a progress bar on a terminal, and nothing elsewhere.
func (c *exerciseCmd) bar(u *ui.UI, name string) *progressbar.ProgressBar {
	w := io.Discard
	if u.Progress {
		w = u.Stderr
	}
	return progressbar.NewOptions(c.Count,
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetVisibility(u.Progress),
		progressbar.OptionSetDescription(ui.Shorten(host.OneLine(name), 24)),
		progressbar.OptionSetWidth(30),
		progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)
}

func (c *exerciseCmd) report(p *program, name string, s engine.Sums) {
	p.Printf("%s: %s in %s, the guest was paused %s to %s in all\n", name, ui.Count(uint64(s.Pauses), "pause"),
		host.Nanoseconds(uint64(s.Took)), host.Nanoseconds(uint64(s.Shortest)), host.Nanoseconds(uint64(s.Longest)))
	if s.Late > 0 {
		p.Warn("this host couldn't make %g pauses a second: %d of the pauses came late; use a lower --rate, or check what else keeps it busy", c.Rate, s.Late)
	}
}

// keepUp is after how many pauses the records are fetched: the module keeps the newest 256.
const keepUp = 128

// watcher collects the shim's status and records during the exercise.
type watcher struct {
	dirs    status.Dirs
	uuid    string
	why     string // why there is no answer from a shim; empty: there is
	stock   bool   // there is no shim: the clock isn't corrected
	before  control.Status
	after   control.Status
	records []clockpage.Record
	pauses  int
}

// newWatcher takes the status before the first pause.
func newWatcher(at status.Dirs, uuid string, local bool) *watcher {
	w := &watcher{dirs: at, uuid: uuid}
	if !local {
		w.why = "its shim, if there is one, is on another host"
		return w
	}
	w.before = w.ask()
	w.after = w.before
	return w
}

func (w *watcher) ask() control.Status {
	s, err := w.dirs.Status(w.uuid, status.MaxRecords)
	switch {
	case err == nil:
		return *s
	case errors.Is(err, os.ErrNotExist):
		w.why, w.stock = "no shim serves it", true
	default:
		w.why = ui.ErrorText(err)
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
func (w *watcher) report(p *program, name string, s engine.Sums) {
	w.collect()
	if w.stock {
		p.Printf("%s: %s, so the guest's clock lost the sum of all pauses: %s to %s\n", name, w.why,
			host.Nanoseconds(uint64(s.Shortest)), host.Nanoseconds(uint64(s.Longest)))
		return
	}
	if w.why != "" {
		p.Printf("%s: how the clock was kept isn't known: %s\n", name, w.why)
		return
	}
	for _, line := range compare(w.before, w.after, w.records) {
		p.Printf("%-16s %s\n", line[0], line[1])
	}
}

// compare words the difference between two statuses, with the records in between.
func compare(before, after control.Status, records []clockpage.Record) [][2]string {
	difference := control.Status{
		Counts: clockpage.Counts{
			Pauses:   after.Pauses - before.Pauses,
			Dropped:  after.Dropped - before.Dropped,
			Anchored: after.Anchored - before.Anchored,
			Held:     after.Held - before.Held,
			Passed:   after.Passed - before.Passed,

			OverLimit:   after.OverLimit - before.OverLimit,
			Reanchored:  after.Reanchored - before.Reanchored,
			StaleOrders: after.StaleOrders - before.StaleOrders,
			Busy:        after.Busy - before.Busy,
		},
		Disagreements: after.Disagreements - before.Disagreements,
	}
	lines := [][2]string{
		{"state", host.OneLine(string(after.State))},
		{"pauses", status.PausesInAll(&difference)},
		{"caught up", host.Nanoseconds(after.CaughtUp - before.CaughtUp)},
	}
	add := func(name, value string) { lines = append(lines, [2]string{name, value}) }
	if lost, ok := notCaughtUp(records); ok {
		add("lost", host.SignedNanoseconds(lost))
	}
	if len(records) > 0 {
		add("worst residual", host.Nanoseconds(worstResidual(records)))
		median, worst := costs(records)
		add("cost", fmt.Sprintf("median %s, worst %s", host.Nanoseconds(median), host.Nanoseconds(worst)))
	}
	if missing := difference.Pauses - min(difference.Pauses, uint64(len(records))); missing > 0 {
		add("not recorded", ui.Count(missing, "pause"))
	}
	add("errors", mishaps(&difference, after.LastDisagreement))
	return lines
}

// notCaughtUp sums what the guest's clock lost at pauses that were neither dropped nor anchored.
func notCaughtUp(records []clockpage.Record) (lost int64, any bool) {
	for _, r := range records {
		if !r.CaughtUp() {
			lost, any = lost+int64(r.Took()), true
		}
	}
	return lost, any
}

func worstResidual(records []clockpage.Record) uint64 {
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
func costs(records []clockpage.Record) (median, worst uint64) {
	sorted := make([]uint64, len(records))
	for i, r := range records {
		sorted[i] = r.Cost
	}
	slices.Sort(sorted)
	return sorted[len(sorted)/2], sorted[len(sorted)-1]
}

func mishaps(s *control.Status, disagreement string) string {
	all := append([]status.Counter{{Name: "passed in doubt", N: s.Passed}}, status.Doubts(s)...)
	found := status.Counted(append(all, status.Counter{Name: "disagreements", N: s.Disagreements}))
	if s.Disagreements > 0 && disagreement != "" {
		found = append(found, host.OneLine(disagreement))
	}
	return cmp.Or(strings.Join(found, ", "), "none")
}
