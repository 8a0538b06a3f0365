package main

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"ftclock/test/guest"
	"ftclock/test/measure"
	"ftclock/test/qmp"
	"ftclock/test/rig"
)

const pauseLength = 2 * time.Millisecond

// kept is a guest whose clock is kept in some way, or isn't: paused, unless it is its turn.
type kept struct {
	name string
	resident
}

// keep starts a guest; shim says whether ftclock keeps its clock.
func (b *bench) keep(name string, shim bool, env ...string) (*kept, error) {
	r, err := b.settle(shim, env...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &kept{name, *r}, nil
}

func (k *kept) end() {
	_ = k.clock.Close()
	k.qemu.Close()
}

// keepBy is keep, with a client by another way in the place of its own.
func (b *bench) keepBy(name string, shim bool, dial func(*rig.QEMU) (*qmp.Conn, error)) (*kept, error) {
	k, err := b.keep(name, shim)
	if err != nil {
		return nil, err
	}
	if err = k.shim.Close(); err == nil {
		k.shim, err = dial(k.qemu)
	}
	if err != nil {
		k.end()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return k, nil
}

// fourWays starts a guest each without anything, with the competitor, and with ftclock in both ways, in this order. end ends those that
// were started, whatever the error says.
func (b *bench) fourWays() (guests []*kept, end func(), err error) {
	end = func() {
		for _, k := range guests {
			k.end()
		}
	}
	library, err := realtimeLibrary()
	if err != nil {
		return nil, end, err
	}
	for _, way := range []struct {
		name string
		shim bool
		env  []string
	}{
		{"stock QEMU", false, nil},
		{"KVM_CLOCK_REALTIME", false, []string{"LD_PRELOAD=" + library}},
		{"ftclock attached", true, nil},
		{"ftclock preloaded", true, []string{"LD_PRELOAD=" + moduleLibrary}},
	} {
		k, err := b.keep(way.name, way.shim, way.env...)
		if err != nil {
			return guests, end, err
		}
		guests = append(guests, k)
	}
	return guests, end, nil
}

// first looks at paused guests' clocks before anything is measured.
func first(guests ...*kept) (err error) {
	for _, k := range guests {
		if k.first, _, err = k.look(); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
	}
	return nil
}

// kept checks how paused guests' clocks were kept since their first look: stock lost that much at least, of the others' nothing
// is missing and none went back.
func (b *bench) kept(where string, least time.Duration, stock *kept, others ...*kept) error {
	for _, k := range append([]*kept{stock}, others...) {
		offset, backsteps, err := k.look()
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		lost := offset - k.first
		if k == stock {
			b.check(lost >= int64(least), "%s, stock QEMU lost only %s of %v: the measuring is broken", where, measure.Drift(lost), least)
			continue
		}
		b.check(!guest.Off(lost), "%s, %s left %s", where, k.name, measure.Drift(lost))
		b.check(backsteps == 0, "%s, %s: the guest saw its clock go back %d times", where, k.name, backsteps)
	}
	return nil
}

// drift pauses four guests in turns and looks what each has lost.
func (b *bench) drift() (string, error) {
	subjects, end, err := b.fourWays()
	defer end()
	if err != nil {
		return "", err
	}
	counts := pick(b, []int{10, 100, 300, 1000, 3000, 10_000}, []int{10, 100})
	shown := pick(b, []int{10, 100, 1000, 10_000}, []int{10, 100})
	drifts := make(map[int][]int64)
	backsteps := make([]uint64, len(subjects))
	if err := first(subjects...); err != nil {
		return "", err
	}
	// The pauses of stock QEMU from outside, at least: from the answer to a stop until the next cont.
	stopped, paused := time.Now(), time.Duration(0)
	done, began := 0, time.Now()
	for n, count := range counts {
		for ; done < count; done++ {
			for i, s := range subjects {
				if i == 0 && done > 0 {
					paused += time.Since(stopped)
				}
				if err := s.shim.Run("cont", "stop"); err != nil {
					return "", fmt.Errorf("%s: %w", s.name, err)
				}
				if i == 0 {
					stopped = time.Now()
				}
			}
			if b.late(began) { // this many, then, and no more
				done++
				count, counts = done, append(slices.Clone(counts[:n]), done)
				break
			}
		}
		for i, s := range subjects {
			if i == 0 {
				paused += time.Since(stopped)
			}
			offset, back, err := s.look()
			if err != nil {
				return "", fmt.Errorf("%s: %w", s.name, err)
			}
			if i == 0 {
				stopped = time.Now()
			}
			drifts[count], backsteps[i] = append(drifts[count], offset-s.first), back
		}
		if len(counts) == n+1 {
			shown = append(slices.DeleteFunc(shown, func(c int) bool { return c >= count }), count)
		}
		fmt.Fprintf(b.progress, "bench:   %d pauses, %v: %v ns\n", count, time.Since(began).Round(time.Second), drifts[count])
		if len(counts) == n+1 {
			break
		}
	}

	head := []string{"drift left after so many pauses"}
	for _, n := range shown {
		head = append(head, fmt.Sprint(n))
	}
	t := measure.NewTable(append(head, "saw time go back")...)
	last := counts[len(counts)-1]
	for i, s := range subjects {
		cells := []string{s.name}
		for _, n := range shown {
			cells = append(cells, measure.Drift(drifts[n][i]))
		}
		t.Row(append(cells, fmt.Sprintf("%d times", backsteps[i]))...)
		// Stock loses each pause; the others were there to do something about it, and did.
		lost := drifts[last][i]
		switch i {
		case 0:
			b.check(lost >= int64(paused), "stock QEMU lost only %s of %d pauses of %v in all: the measuring is broken", measure.Drift(lost), last, paused)
		case 1:
			b.check(lost < int64(paused)/10 && lost > -int64(paused)/10, "KVM_CLOCK_REALTIME left %s: it didn't do its work", measure.Drift(lost))
		default:
			for _, n := range counts {
				d := drifts[n][i]
				b.check(!guest.Off(d), "%s left %s of %d pauses", s.name, measure.Drift(d), n)
			}
			b.check(backsteps[i] == 0, "%s: the guest saw its clock go back %d times", s.name, backsteps[i])
		}
	}
	note := fmt.Sprintf("\nFour guests in turns, in QEMUs without libvirt, ftclock's through its shim: each goes on and is paused again while the others are paused, "+
		"for %v on average; while another one's clock is read it stands longer, hence what stock loses of the first ten. A reading is the smallest of 300 or more of CLOCK_MONOTONIC_RAW less the guest's kvmclock, the time that the guest took to publish it taken off; negative is ahead.\n",
		(paused / time.Duration(last)).Round(100*time.Microsecond))
	if last < 10_000 && !b.quick {
		note += fmt.Sprintf("\nThe machine was too busy for more than %d pauses in %v; `make bench BENCHFLAGS='-only drift -longest 1h'` makes 10,000.\n", last, b.longest)
	}
	if b.pictures == "" {
		return t.String() + note, nil
	}
	path := filepath.Join(b.pictures, "bench-drift.svg")
	if err := drawDrift(path, subjects, counts, drifts); err != nil {
		return "", err
	}
	return t.String() + note + "\n![Drift over the number of pauses](pictures/bench-drift.svg)\n", nil
}

// drawDrift draws what was left, both axes logarithmic.
func drawDrift(path string, subjects []*kept, counts []int, drifts map[int][]int64) error {
	p := measure.NewPlot("Drift left over the number of pauses", "pauses", "µs, magnitude")
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, decades(2)
	shapes := []draw.GlyphDrawer{draw.CircleGlyph{}, draw.TriangleGlyph{}, draw.SquareGlyph{}, draw.CrossGlyph{}}
	for i, s := range subjects {
		var xys plotter.XYs
		for _, n := range counts {
			d := drifts[n][i]
			xys = append(xys, plotter.XY{X: float64(n), Y: max(0.01, float64(max(d, -d))/1e3)})
		}
		line, dots, err := measure.Curve(xys, measure.Palette[i], shapes[i])
		if err != nil {
			return err
		}
		p.Add(line, dots)
		p.Legend.Add(s.name, line, dots)
	}
	p.Y.Min, p.Y.Max = 0.01, p.Y.Max*10
	// Beside the lines, where room is made for it; its words may get longer in another font.
	p.Legend.Top, p.Legend.Left, p.Legend.Padding = true, true, vg.Points(3)
	p.Legend.XOffs, p.Legend.YOffs = vg.Points(405), vg.Points(-70)
	p.X.Max *= 30
	return measure.WritePlots(path, p)
}

// decades marks each power of ten, and labels each n-th.
type decades int

func (n decades) Ticks(low, high float64) (all []plot.Tick) {
	for e := int(math.Ceil(math.Log10(low) - 1e-9)); float64(e) <= math.Log10(high); e++ {
		tick := plot.Tick{Value: math.Pow10(e)}
		if e%int(n) == 0 {
			tick.Label = strconv.FormatFloat(tick.Value, 'g', -1, 64)
		}
		all = append(all, tick)
	}
	return all
}
