package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg/draw"

	"ftclock/test/guest"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"
	"ftclock/test/rig"
)

// resident is one of many guests, paused unless it is its turn.
type resident struct {
	qemu  *rig.QEMU
	shim  *qmp.Conn
	clock *guest.Clock
	first int64 // offset, ns
}

// crowd is what was measured with so many.
type crowd struct {
	domains   int
	rate      float64 // checkpoints a second and domain
	cpu       float64 // µs a checkpoint
	pss       float64 // MiB a domain
	drift     int64   // the largest, ns, of those that were read
	read      int
	pauses    int // of each
	backsteps uint64
}

// many makes checkpoints of more and more guests.
func (b *bench) many() (string, error) {
	const perSecond = 10
	var all []*resident
	defer func() {
		var group sync.WaitGroup
		for _, r := range all {
			group.Go(func() {
				_ = r.clock.Close()
				r.qemu.Close()
			})
		}
		group.Wait()
	}()
	var crowds []crowd
	began, short := time.Now(), ""
	for _, n := range pick(b, []int{1, 10, 50, 100}, []int{1, 3}) {
		if b.late(began) {
			short = fmt.Sprintf("\nThe machine was too busy for %d domains in %v; `make bench BENCHFLAGS='-only many -longest 1h'` goes up to 100.\n", n, b.longest)
			break
		}
		for len(all) < n && !(len(all) > 0 && b.late(began)) {
			r, err := b.settle(true)
			if err == nil {
				all = append(all, r)
				_, err = r.shim.Execute("stop", nil)
			}
			if err != nil {
				return "", fmt.Errorf("domain %d: %w", len(all)+1, err)
			}
		}
		c, err := checkpointsOf(all, perSecond, pick(b, 10*time.Second, 2*time.Second))
		if err != nil {
			return "", err
		}
		crowds = append(crowds, c)
		fmt.Fprintf(b.progress, "bench:   %+v\n", c)
		b.check(!guest.Off(c.drift), "one of %d domains is off by %s", len(all), measure.Drift(c.drift))
		b.check(c.backsteps == 0, "of %d domains some saw their clock go back %d times", n, c.backsteps)
		b.check(c.pauses > 0, "%d domains made no checkpoints", n)
	}
	t := measure.NewTable("domains", "checkpoints a second of each", "processor time of the shims for a checkpoint", "memory (PSS) of the shims, a domain", "all",
		"largest drift left")
	for _, c := range crowds {
		t.Row(fmt.Sprint(c.domains), fmt.Sprintf("%.1f", c.rate), fmt.Sprintf("%.0f µs", c.cpu), fmt.Sprintf("%.1f MiB", c.pss),
			fmt.Sprintf("%.0f MiB", c.pss*float64(c.domains)), fmt.Sprintf("%s (%d pauses, %d guests read)", measure.Drift(c.drift), c.pauses, c.read))
	}
	t.WriteString("\nQEMUs without libvirt, each with a shim of its own and the module loaded. All of them together have two CPUs, and a guest that is emulated takes all of one: so " +
		"each guest is paused but for the fraction of a millisecond between a cont and the next stop. Memory and processor time are the shims', as under systemd.\n" + short)
	if b.pictures == "" {
		return t.String(), nil
	}
	if err := drawCrowds(filepath.Join(b.pictures, "bench-many.svg"), crowds); err != nil {
		return "", err
	}
	return t.String() + "\n![Cost over the number of domains](pictures/bench-many.svg)\n", nil
}

// bootedState is the state of a guest that has booted, which takes seconds, in a file.
func (b *bench) bootedState() (string, error) {
	q, err := b.machine(nil)
	if err != nil {
		return "", err
	}
	defer q.Close()
	conn, err := q.Dial() // its memory is there once the monitor answers
	if err != nil {
		return "", err
	}
	clock, err := guest.Open(q.PID)
	if err != nil {
		return "", err
	}
	defer clock.Close()
	if err := clock.WaitMoving(2 * time.Minute); err != nil {
		return "", err
	}
	if err := conn.Run("stop"); err != nil {
		return "", err
	}
	path := filepath.Join(privatelibvirt.Dir, "booted")
	if _, err := conn.Execute("migrate", map[string]string{"uri": "exec:cat >" + path}); err != nil {
		return "", err
	}
	return path, awaitStatus(conn, "query-migrate", "completed")
}

// awaitStatus waits for a minute until the answer to a query has one of the statuses.
func awaitStatus(conn *qmp.Conn, query string, wanted ...string) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		answer, err := conn.Execute(query, nil)
		var info struct{ Status string }
		if err == nil {
			err = json.Unmarshal(answer, &info)
		}
		if err != nil || slices.Contains(wanted, info.Status) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("after a minute the status of a booted guest is %s, want one of %v", info.Status, wanted)
		}
	}
}

// settle starts a guest from the state of one that has booted, in a QEMU with that environment, with a shim or without. It runs, and was
// paused twice: once for the state that was loaded, once for the anchor.
func (b *bench) settle(shim bool, env ...string) (_ *resident, err error) {
	if b.booted == "" {
		if b.booted, err = b.bootedState(); err != nil {
			return nil, err
		}
	}
	q, err := b.machine(env, "-incoming", "exec:cat "+b.booted)
	if err != nil {
		return nil, err
	}
	r := &resident{qemu: q}
	defer func() {
		if err != nil {
			q.Close()
		}
	}()
	direct, err := q.Dial()
	if err != nil {
		return nil, err
	}
	if err := awaitStatus(direct, "query-status", "paused", "running"); err != nil {
		return nil, fmt.Errorf("loading it: %w", err)
	}
	if r.shim = direct; shim {
		direct.Close() // there is one such monitor, and who comes next waits for it
		if r.shim, err = q.DialShim(bins); err != nil {
			return nil, err
		}
	}
	if r.clock, err = guest.Open(q.PID); err != nil {
		return nil, err
	}
	if err := r.shim.Run("cont"); err != nil { // it was saved while it was paused
		return nil, err
	}
	if err := r.clock.WaitMoving(time.Minute); err != nil {
		return nil, err
	}
	for range 2 {
		if err := r.run(time.Millisecond); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// run pauses a guest, or leaves it paused, and has it run for that long before it is paused again.
func (r *resident) run(length time.Duration) error {
	if err := r.shim.Run("stop", "cont"); err != nil {
		return err
	}
	time.Sleep(length)
	return r.shim.Run("stop")
}

// look reads a paused guest's offset and how often it saw its clock go back.
func (r *resident) look() (offset int64, backsteps uint64, err error) {
	if err := r.shim.Run("cont"); err != nil {
		return 0, 0, err
	}
	if _, err := r.clock.Steady(); err != nil {
		return 0, 0, err
	}
	if offset, _, err = r.clock.Offset(500 * time.Millisecond); err != nil {
		return 0, 0, err
	}
	if backsteps, _, err = r.clock.Backsteps(); err != nil {
		return 0, 0, err
	}
	return offset, backsteps, r.shim.Run("stop")
}

// checkpointsOf has each guest continued and stopped again so many times a second.
func checkpointsOf(all []*resident, perSecond int, length time.Duration) (c crowd, err error) {
	c.domains = len(all)
	var pids []int
	var readers []*resident
	for i, r := range all {
		pids = append(pids, r.qemu.Shim)
		if i%max(1, len(all)/10) == 0 {
			readers = append(readers, r)
		}
	}
	c.read = len(readers)
	for _, r := range readers {
		if r.first, _, err = r.look(); err != nil {
			return c, err
		}
	}
	before, err := measure.CPU(pids...)
	if err != nil {
		return c, err
	}
	begin := time.Now()
	for time.Since(begin) < length {
		for _, r := range all {
			if err := r.shim.Run("cont", "stop"); err != nil {
				return c, err
			}
		}
		c.pauses++
		time.Sleep(time.Until(begin.Add(time.Duration(c.pauses) * time.Second / time.Duration(perSecond))))
	}
	c.rate = float64(c.pauses) / time.Since(begin).Seconds()
	after, err := measure.CPU(pids...)
	if err != nil {
		return c, err
	}
	c.cpu = float64(after-before) / 1e3 / float64(c.pauses*len(all))
	for _, pid := range pids {
		pss, _, err := measure.MemoryKiB(pid)
		if err != nil {
			return c, err
		}
		c.pss += pss / 1024 / float64(len(all))
	}
	for _, r := range readers {
		offset, backsteps, err := r.look()
		if err != nil {
			return c, err
		}
		if d := offset - r.first; max(d, -d) >= max(c.drift, -c.drift) {
			c.drift = d
		}
		c.backsteps += backsteps
	}
	return c, nil
}

// drawCrowds draws memory, processor time and drift over the number of domains.
func drawCrowds(path string, crowds []crowd) error {
	var plots []*plot.Plot
	for i, curve := range []struct {
		title, unit string
		of          func(crowd) float64
	}{
		{"Processor time of a domain's shim for a checkpoint", "µs", func(c crowd) float64 { return c.cpu }},
		{"Memory (PSS) of a domain's shim", "MiB", func(c crowd) float64 { return c.pss }},
		{"Largest drift left", "µs, magnitude", func(c crowd) float64 { return float64(max(c.drift, -c.drift)) / 1e3 }},
	} {
		p := measure.NewPlot(curve.title, "domains", curve.unit)
		var xys plotter.XYs
		for _, c := range crowds {
			xys = append(xys, plotter.XY{X: float64(c.domains), Y: curve.of(c)})
		}
		line, dots, err := measure.Curve(xys, measure.Palette[i], draw.CircleGlyph{})
		if err != nil {
			return err
		}
		p.Add(line, dots)
		p.Y.Min, p.Y.Max = 0, p.Y.Max*1.2
		plots = append(plots, p)
	}
	return measure.WritePlots(path, plots...)
}
