package report

import (
	"fmt"
	"html"
	"html/template"
	"math"
	"strings"
	"time"

	"ftclock/record"
)

// Plot is a picture with its words. The SVG has classes and no colours: those are the page's, for a light, a dark and a
// printed one. That is why it is drawn here, and not by the library that the test programs use (package ftclock/test/measure):
// the library draws in fixed colours and without the titles that tell of a gap where one points at it, and with its fonts
// it would add 5.6 MB to a program of 19 MB.
type Plot struct {
	SVG     template.HTML
	Caption string
}

// Sizes in the SVG's own units.
const (
	plotWidth  = 960
	plotHeight = 240
	plotLeft   = 78
	plotRight  = 12
	plotTop    = 12
	plotBottom = 30
	maxBins    = 400 // of time
)

// bin is a part of the report's time, one minute or several.
type bin struct {
	at       time.Time // its beginning
	last     time.Time // beginning of its last minute
	m        record.Minute
	any      bool
	runStart bool   // its first pause is the first known of a QEMU
	lost     uint64 // of this QEMU, up to and with this bin
	behind   uint64
	broken   bool // something is missing right before it, or in it
}

// bins are those with pauses; wide is how much time each stands for.
func (p *Report) bins() (all []bin, wide time.Duration) {
	wide = time.Minute * time.Duration(math.Ceil(p.To.Sub(p.From).Minutes()/maxBins))
	wide = max(wide, time.Minute)
	run := ""
	var lost, behind uint64
	edge := p.From
	for i := range p.Minutes {
		m := &p.Minutes[i]
		begins := m.Run != run
		if begins {
			run, lost, behind = m.Run, 0, 0
		}
		lost, behind = lost+m.Lost, behind+m.Held+m.Passed
		at := p.From.Add(m.Start.Sub(p.From).Truncate(wide))
		n := len(all) - 1
		if n < 0 || !all[n].at.Equal(at) || begins {
			broken := begins || p.notCorrected(edge, m.Start)
			all = append(all, bin{at: at, runStart: begins, broken: broken, m: record.Minute{Start: m.Start, Run: m.Run}})
			n++
		}
		b := &all[n]
		b.any, b.last, b.lost, b.behind = true, m.Start, lost, behind
		b.m.Pauses += m.Pauses
		b.m.Residual = b.m.Residual.Merge(m.Residual)
		edge = m.Start.Add(time.Minute)
	}
	return all, wide
}

// notCorrected tells whether a time isn't wholly corrected.
func (p *Report) notCorrected(from, to time.Time) bool {
	for _, s := range p.Stretches {
		if s.Kind != Corrected && s.From.Before(to) && s.To.After(from) {
			return true
		}
	}
	return false
}

// canvas is an SVG with a time axis.
type canvas struct {
	strings.Builder
	p         *Report
	low, high float64 // of the value axis
	id        string  // its own on the page
}

func (c *canvas) x(t time.Time) float64 {
	whole := c.p.To.Sub(c.p.From).Seconds()
	if whole <= 0 {
		return plotLeft
	}
	part := min(max(t.Sub(c.p.From).Seconds()/whole, 0), 1)
	return plotLeft + part*(plotWidth-plotLeft-plotRight)
}

func (c *canvas) y(v float64) float64 {
	return plotHeight - plotBottom - (v-c.low)/(c.high-c.low)*(plotHeight-plotTop-plotBottom)
}

func (c *canvas) add(format string, args ...any) { fmt.Fprintf(&c.Builder, format, args...) }

// begin begins a picture; id is its own on the page.
func begin(p *Report, id, title string) *canvas {
	c := &canvas{p: p, id: id}
	c.add(`<svg viewBox="0 0 %d %d" role="img" aria-label="%s" xmlns="http://www.w3.org/2000/svg">`, plotWidth, plotHeight, html.EscapeString(title))
	return c
}

func (c *canvas) end(caption string) Plot {
	c.add(`</svg>`)
	return Plot{template.HTML(c.String()), caption} // made of numbers and of what was escaped above
}

// stretches shades the time that isn't corrected, and has what is drawn with clipped seen only where something is known.
func (c *canvas) stretches() {
	c.add(`<clipPath id="%s">`, c.id)
	for _, s := range c.p.Stretches {
		if s.Kind != Unknown && s.Kind != Off {
			c.add(`<rect x="%.1f" y="0" width="%.1f" height="%d"/>`, c.x(s.From), c.x(s.To)-c.x(s.From), plotHeight)
		}
	}
	c.add(`</clipPath>`)
	class := map[Kind]string{Uncorrected: "uncorrected", Unknown: "unknown", Off: "off"}
	for _, s := range c.p.Stretches {
		if class[s.Kind] == "" {
			continue
		}
		from, to := c.x(s.From), c.x(s.To)
		wide := max(to-from, 1.5) // a short gap must be seen, too
		c.add(`<rect class="%s" x="%.1f" y="%d" width="%.1f" height="%d"><title>%s: %s to %s UTC</title></rect>`, class[s.Kind],
			min(from, plotWidth-plotRight-wide), plotTop, wide, plotHeight-plotTop-plotBottom, s.Kind, s.From.Format(time.DateTime), s.To.Format(time.DateTime))
	}
}

// values scales the value axis from low to high, and draws it with words from say.
func (c *canvas) values(low, high float64, say func(float64) string) {
	if high <= low {
		high = low + 1
	}
	step := niceStep((high - low) / 4)
	c.low, c.high = math.Floor(low/step+1e-9)*step, math.Ceil(high/step-1e-9)*step
	for v := c.low; v <= c.high+step/2; v += step {
		if math.Abs(v) < step/1e6 {
			v = 0
		}
		c.add(`<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, plotLeft, plotWidth-plotRight, c.y(v), c.y(v))
		c.add(`<text class="axis" x="%d" y="%.1f" text-anchor="end">%s</text>`, plotLeft-8, c.y(v)+4, html.EscapeString(say(v)))
	}
}

// niceStep is the smallest of 1, 2, 5, 10, … that isn't below.
func niceStep(least float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(least)))
	for _, f := range []float64{1, 2, 5} {
		if f*power >= least*(1-1e-9) {
			return f * power
		}
	}
	return 10 * power
}

// times draws the time axis.
func (c *canvas) times() {
	from, to := c.p.From, c.p.To
	least := to.Sub(from) / 8
	steps := []time.Duration{time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute, time.Hour, 2 * time.Hour,
		3 * time.Hour, 6 * time.Hour, 12 * time.Hour, 24 * time.Hour, 48 * time.Hour, 7 * 24 * time.Hour}
	step := steps[len(steps)-1]
	for _, s := range steps {
		if s >= least {
			step = s
			break
		}
	}
	for step < least {
		step *= 2
	}
	form := "15:04"
	if to.Sub(from) > 24*time.Hour {
		form = "01-02 15:04"
	}
	if step >= 24*time.Hour {
		form = "01-02"
	}
	for t := from.Truncate(step); !t.After(to); t = t.Add(step) {
		if x := c.x(t); !t.Before(from) && x < plotWidth-plotRight-20 {
			c.add(`<line class="tick" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>`, x, x, plotHeight-plotBottom, plotHeight-plotBottom+5)
			anchor := "middle"
			if x < plotLeft+20 {
				anchor = "start"
			}
			c.add(`<text class="axis" x="%.1f" y="%d" text-anchor="%s">%s</text>`, x, plotHeight-plotBottom+19, anchor, t.Format(form))
		}
	}
	c.add(`<line class="tick" x1="%d" x2="%d" y1="%d" y2="%d"/>`, plotLeft, plotWidth-plotRight, plotHeight-plotBottom, plotHeight-plotBottom)
}

// line draws values of bins as steps, and breaks where something isn't known.
func (c *canvas) line(class string, all []bin, wide time.Duration, value func(*bin) float64) {
	var path strings.Builder
	for i := range all {
		b := &all[i]
		y := c.y(value(b))
		if b.broken || i == 0 {
			fmt.Fprintf(&path, "M%.1f %.1f", c.x(b.at), y)
		} else {
			fmt.Fprintf(&path, "L%.1f %.1f", c.x(b.at), y)
		}
		fmt.Fprintf(&path, "L%.1f %.1f", c.x(earliest(b.at.Add(wide), c.p.To)), y)
	}
	c.add(`<path class="%s" clip-path="url(#%s)" d="%s"/>`, class, c.id, path.String())
}

func (c *canvas) nothing() Plot {
	c.add(`<text class="axis" x="%d" y="%d" text-anchor="middle">no pause was recorded in this time</text>`, plotWidth/2, plotHeight/2)
	return c.end("")
}

func sayNanoseconds(v float64) string { return nanoseconds(int64(math.Round(v))) }

// drift shows how far the guest's clock would be behind without ftclock, and how far it was left behind.
func (p *Report) drift() Plot {
	c := begin(p, "drift", "Drift of the guest's clock without and with ftclock")
	all, wide := p.bins()
	if len(all) == 0 {
		c.stretches()
		return c.nothing()
	}
	high := 0.0
	for _, b := range all {
		high = max(high, float64(b.lost))
	}
	unit, name := 1e6, "ms"
	for _, u := range []struct {
		ns   float64
		name string
	}{{1e9, "s"}, {60e9, "min"}, {3600e9, "h"}} {
		if high >= 2*u.ns {
			unit, name = u.ns, u.name
		}
	}
	c.values(0, max(high/unit, 1), func(v float64) string { return fmt.Sprintf("%g %s", math.Round(v*1000)/1000, name) })
	c.stretches()
	c.times() // the axis is what a clock that was never off would be drawn over
	c.line("without", all, wide, func(b *bin) float64 { return float64(b.lost) / unit })
	c.line("with", all, wide, func(b *bin) float64 { return (float64(b.behind) + float64(b.m.Residual.Worst())) / unit })
	return c.end("How far the guest's clock would be behind by the recorded pauses since its start without ftclock, and how far it was off with it. " +
		"Lines break where something isn't known or wasn't corrected, and what was missed isn't in them.")
}

// near shows the residuals.
func (p *Report) near() Plot {
	c := begin(p, "near", "Distance of the guest's clock from the reference")
	all, wide := p.bins()
	var low, high float64
	some := false
	for _, b := range all {
		if b.m.Residual.Count > 0 {
			low, high, some = min(low, float64(b.m.Residual.Min)), max(high, float64(b.m.Residual.Max)), true
		}
	}
	if !some {
		c.stretches()
		return c.nothing()
	}
	c.values(low, high, sayNanoseconds)
	c.stretches()
	c.add(`<g clip-path="url(#%s)">`, c.id)
	for i := range all {
		b := &all[i]
		if d := b.m.Residual; d.Count > 0 {
			from, to := c.x(b.at), c.x(earliest(b.at.Add(wide), p.To))
			top, bottom := c.y(float64(d.Max)), c.y(float64(d.Min))
			c.add(`<rect class="band" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`, from, top, max(to-from, 1), max(bottom-top, 1))
			median := c.y(float64(d.Median()))
			c.add(`<line class="with" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, from, max(to, from+1), median, median)
		}
	}
	c.add(`</g>`)
	c.times()
	return c.end("The kernel's clock less the reference at each recorded pause: smallest to largest of each " + each(wide) + ", and the median.")
}

func each(wide time.Duration) string {
	if wide == time.Minute {
		return "minute"
	}
	return fmt.Sprintf("%d minutes", int(wide.Minutes()))
}

// rate shows the pauses a minute.
func (p *Report) rate() Plot {
	c := begin(p, "rate", "Pauses a minute")
	all, wide := p.bins()
	high := 0.0
	minutes := wide.Minutes()
	for _, b := range all {
		high = max(high, float64(b.m.Pauses)/minutes)
	}
	missed := p.missed()
	for _, x := range missed {
		high = max(high, x.rate)
	}
	if len(all) == 0 {
		c.stretches()
		return c.nothing()
	}
	c.values(0, max(high, 1), func(v float64) string { return fmt.Sprintf("%g", math.Round(v*1000)/1000) })
	c.stretches()
	for i := range all {
		b := &all[i]
		from, to := c.x(b.at), c.x(earliest(b.at.Add(wide), p.To))
		known := float64(b.m.Pauses) / minutes
		c.add(`<rect class="bar" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`, from, c.y(known), max(to-from-0.5, 0.8), c.y(0)-c.y(known))
	}
	for _, x := range missed {
		from, to := c.x(x.from), c.x(x.to)
		c.add(`<rect class="missed" x="%.1f" y="%.1f" width="%.1f" height="%.1f"><title>%d known by number alone</title></rect>`, from, c.y(x.rate), max(to-from, 1.5),
			c.y(0)-c.y(x.rate), x.count)
	}
	c.times()
	caption := "Recorded pauses of each minute."
	if wide > time.Minute {
		caption = "Recorded pauses a minute, the mean of each " + each(wide) + "."
	}
	if len(missed) > 0 {
		caption += " Framed: pauses known by number alone, as the mean over the time in which they came; when in it isn't known."
	}
	return c.end(caption)
}

// missedBar is a time in which pauses came that are known by number alone.
type missedBar struct {
	from, to time.Time
	count    uint64
	rate     float64 // a minute
}

func (p *Report) missed() (all []missedBar) {
	for i := range p.Minutes {
		m := &p.Minutes[i]
		for _, x := range m.Missed {
			b := missedBar{from: time.Unix(0, x.From).UTC(), to: time.Unix(0, x.To).UTC(), count: x.Count}
			if x.From == 0 || !b.from.Before(b.to) {
				b.from, b.to = m.Start, m.Start.Add(time.Minute)
			}
			// A few in no time are no rate.
			b.rate = float64(x.Count) / max(b.to.Sub(b.from).Minutes(), 0.2)
			all = append(all, b)
		}
	}
	return all
}

// classes are the bounds of the distribution's bars, in ns, without signs.
var classes = []int64{20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, math.MaxInt64}

// spread shows how the residuals are distributed.
func (p *Report) spread() Plot {
	c := begin(p, "spread", "Distribution of the distance from the reference")
	var residual record.Distribution
	for i := range p.Minutes {
		residual = residual.Merge(p.Minutes[i].Residual)
	}
	if residual.Count == 0 {
		return c.nothing()
	}
	counts := make([]uint64, len(classes))
	for _, b := range residual.Magnitudes().Buckets {
		for i, upTo := range classes {
			if b.Value <= upTo {
				counts[i] += b.Count
				break
			}
		}
	}
	high := uint64(0)
	for _, n := range counts {
		high = max(high, n)
	}
	c.values(0, float64(high)/float64(residual.Count)*100, func(v float64) string { return fmt.Sprintf("%g %%", math.Round(v*100)/100) })
	wide := float64(plotWidth-plotLeft-plotRight) / float64(len(classes))
	for i, n := range counts {
		x := plotLeft + float64(i)*wide
		class := "bar"
		if i == len(classes)-1 {
			class = "bar beyond"
		}
		if n > 0 {
			y := min(c.y(float64(n)/float64(residual.Count)*100), c.y(0)-1.5) // one among millions is seen, too
			c.add(`<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`, class, x+3, y, wide-6, c.y(0)-y)
			c.add(`<text class="count" x="%.1f" y="%.1f" text-anchor="middle">%s</text>`, x+wide/2, max(y-4, plotTop+2), Number(n))
		}
		label := "≤ " + nanoseconds(classes[i])
		if i == len(classes)-1 {
			label = "more"
		}
		c.add(`<text class="axis" x="%.1f" y="%d" text-anchor="middle">%s</text>`, x+wide/2, plotHeight-plotBottom+19, label)
	}
	c.add(`<line class="tick" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, plotLeft, plotWidth-plotRight, c.y(0), c.y(0))
	return c.end("Recorded pauses by the distance from the reference, without its sign. Each bar begins where the one before it ends; the last is beyond 100 µs.")
}
