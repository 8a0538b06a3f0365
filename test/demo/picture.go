package main

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"

	"ftclock/test/guest"
	"ftclock/test/measure"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

const (
	svgPath = "./demo.svg"
	pngPath = "./demo.png"

	height = 8.4 * vg.Inch
	margin = 14 // points, around everything and between its parts
)

var (
	paleBlue = color.RGBA{R: 0xdc, G: 0xee, B: 0xf8, A: 0xff}
	paleGrey = color.RGBA{R: 0xe2, G: 0xe2, B: 0xe2, A: 0xff}
	darkGrey = color.RGBA{R: 0x44, G: 0x44, B: 0x44, A: 0xff}
)

// writePicture draws both runs into two files.
func writePicture(svg, png string, stock, kept *course, host string) error {
	panels, err := newPanels(stock, kept)
	if err != nil {
		return fmt.Errorf("drawing: %w", err)
	}
	words := caption(stock, kept, host)

	both := func(c draw.Canvas) { compose(c, panels, words) }
	return errors.Join(measure.WritePicture(svg, height, both), measure.WritePicture(png, height, both))
}

// caption tells the figures, a string a line.
func caption(stock, kept *course, host string) []string {
	lines := []string{
		fmt.Sprintf("Stock: paused for %s ms in all, the guest's clock lost %s ms. With ftclock: paused for %s ms, drift left %s µs.",
			fixed(ms(stock.paused), 1), fixed(ms(stock.drift()), 1), fixed(ms(kept.paused), 1), fixed(us(kept.drift()), 2)),
		fmt.Sprintf("Suspend and resume less the pause, median: %s µs stock, %s µs with ftclock (%s). QMP stop and cont: %s µs, %s µs (%s).",
			fixed(us(measure.Median(stock.overheads)), 0), fixed(us(measure.Median(kept.overheads)), 0), ratio(stock.overheads, kept.overheads),
			fixed(us(measure.Median(stock.commands)), 0), fixed(us(measure.Median(kept.commands)), 0), ratio(stock.commands, kept.commands)),
	}
	if len(kept.module) > 0 {
		lines = append(lines, fmt.Sprintf("The module's part of a cont: %s µs (median), %s µs (longest). The guest saw its clock go back %d times (stock: %d).",
			fixed(us(measure.Median(kept.module)), 1), fixed(us(slices.Max(kept.module)), 1), kept.backsteps, stock.backsteps))
	}
	return append(lines,
		"A reading is the smallest of many of CLOCK_MONOTONIC_RAW less the guest's kvmclock, from outside; a busy host makes it too large.",
		"make demo on "+host+".")
}

// panels are the two plots of the picture, one above the other.
type panels struct{ lost, residual *plot.Plot }

func newPanels(stock, kept *course) (panels, error) {
	stockLine, stockDots, err := curve(stock, ms, measure.Vermilion, draw.CircleGlyph{})
	if err != nil {
		return panels{}, err
	}
	keptLine, keptDots, err := curve(kept, ms, measure.Blue, draw.BoxGlyph{})
	if err != nil {
		return panels{}, err
	}
	lost := newPlot(fmt.Sprintf("%d checkpoints of %d ms: time lost by the guest's clock", checkpoints, pause.Milliseconds()), "time lost (ms)")
	lost.Add(newGrid(), stockLine, stockDots, keptLine, keptDots)
	lost.Legend.Add("stock libvirt and QEMU", stockLine, stockDots)
	lost.Legend.Add("with ftclock", keptLine, keptDots)
	lost.Legend.Left, lost.Legend.XOffs = true, 8
	// A flat line at 0 shall not lie on the axis.
	lost.Y.Min, lost.Y.Max = min(-0.05*ms(highest(stock)), lost.Y.Min), 1.05*max(ms(highest(stock)), lost.Y.Max)

	usLine, usDots, err := curve(kept, us, measure.Blue, draw.BoxGlyph{})
	if err != nil {
		return panels{}, err
	}
	bound := us(guest.MaxDrift)
	band, err := plotter.NewPolygon(plotter.XYs{{X: 0, Y: -bound}, {X: float64(checkpoints), Y: -bound}, {X: float64(checkpoints), Y: bound}, {X: 0, Y: bound}})
	if err != nil {
		return panels{}, err
	}
	band.Color, band.LineStyle.Width = paleBlue, 0
	residual := newPlot("The lower curve again, in microseconds: what ftclock leaves", "residual (µs)")
	residual.Add(band, newGrid(), usLine, usDots)
	residual.Legend.Add("with ftclock", usLine, usDots)
	residual.Legend.Add(fmt.Sprintf("±%.0f µs", bound), band)
	limit := max(2*bound, 1.2*us(highest(kept)))
	residual.Y.Min, residual.Y.Max = -limit, limit
	return panels{lost, residual}, nil
}

// highest is the largest drift of a run in either direction, in ns.
func highest(c *course) int64 {
	var h int64
	for _, p := range c.points {
		h = max(h, p.drift, -p.drift)
	}
	return h
}

// curve is a run's drift over its checkpoints, in the unit that scale gives.
func curve(c *course, scale func(ns int64) float64, colour color.Color, shape draw.GlyphDrawer) (*plotter.Line, *plotter.Scatter, error) {
	xys := make(plotter.XYs, len(c.points))
	for i, p := range c.points {
		xys[i].X, xys[i].Y = float64(p.checkpoints), scale(p.drift)
	}
	line, dots, err := measure.Curve(xys, colour, shape)
	if err != nil {
		return nil, nil, err
	}
	line.Width, dots.Radius = 1.6, 2.2
	return line, dots, nil
}

// newPlot is an empty plot over the checkpoints.
func newPlot(title, unit string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, "checkpoints", unit
	p.X.Min, p.X.Max = 0, float64(checkpoints)
	p.Title.Padding, p.Legend.Padding, p.Legend.ThumbnailWidth = 8, 3, 26
	p.Legend.Top, p.Legend.XOffs, p.Legend.YOffs = true, -8, -4
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.TickerFunc(ticks), plot.TickerFunc(ticks)
	for style, size := range map[*text.Style]font.Length{
		&p.Title.TextStyle: 14, &p.X.Label.TextStyle: 12, &p.Y.Label.TextStyle: 12,
		&p.X.Tick.Label: 11, &p.Y.Tick.Label: 11, &p.Legend.TextStyle: 12,
	} {
		style.Font = sans(size)
	}
	return p
}

func newGrid() *plotter.Grid {
	g := plotter.NewGrid()
	g.Horizontal.Color, g.Vertical.Color = paleGrey, paleGrey
	g.Horizontal.Width, g.Vertical.Width = 0.6, 0.6
	return g
}

// ticks are four to nine round numbers, all labelled.
func ticks(low, high float64) []plot.Tick {
	step := math.Pow(10, math.Floor(math.Log10(high-low)))
	for _, divisor := range []float64{2, 2.5} { // a half, a fifth
		if (high-low)/step < 4 {
			step /= divisor
		}
	}
	var all []plot.Tick
	for n := int(math.Ceil(low / step)); float64(n)*step <= high; n++ {
		value := float64(n) * step
		all = append(all, plot.Tick{Value: value, Label: strconv.FormatFloat(value, 'g', 6, 64)})
	}
	return all
}

func sans(size font.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

// compose puts the panels and the caption on a canvas.
func compose(c draw.Canvas, p panels, words []string) {
	c = draw.Crop(c, margin, -margin, margin, -margin)

	style := text.Style{Color: darkGrey, Font: sans(10), Handler: plot.DefaultTextHandler}
	line := 1.35 * style.Font.Size
	for i, text := range words {
		c.FillText(style, vg.Point{X: c.Min.X, Y: c.Min.Y + line*vg.Length(len(words)-1-i) + 3}, text)
	}
	c = draw.Crop(c, 0, 0, line*vg.Length(len(words))+margin, 0)

	split := 0.4 * (c.Max.Y - c.Min.Y)
	upper, lower := draw.Crop(c, 0, 0, split+margin, 0), draw.Crop(c, 0, 0, 0, split-(c.Max.Y-c.Min.Y))
	// The same checkpoint is at the same place in both.
	if gap := p.lost.DataCanvas(upper).Min.X - p.residual.DataCanvas(lower).Min.X; gap > 0 {
		p.residual.Y.Label.Padding += gap
	} else {
		p.lost.Y.Label.Padding -= gap
	}
	p.lost.Draw(upper)
	p.residual.Draw(lower)
}
