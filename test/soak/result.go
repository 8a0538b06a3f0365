package main

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"ftclock/test/guest"
	"ftclock/test/measure"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// noise is what the reading from outside the guest may be off, ns.
const noise = 2_000

// verdict says what is wrong with the clock, or with the measuring of it.
func (r *result) verdict() error {
	var wrong []string
	for _, p := range r.points {
		if guest.Off(p.drift) {
			wrong = append(wrong, fmt.Sprintf("after %d pauses the guest's clock is off by %d ns", p.pauses, p.drift))
			break
		}
	}
	if grown := r.trend() * float64(len(r.residuals)) / 1e6; math.Abs(grown) > guest.MaxDrift {
		wrong = append(wrong, fmt.Sprintf("it drifts by %.0f ns a million pauses", r.trend()))
	}
	if r.backsteps > 0 {
		wrong = append(wrong, fmt.Sprintf("the guest saw its clock go back %d times", r.backsteps))
	}
	if len(r.residuals) == 0 || r.lost < int64(len(r.residuals))*int64(r.plan.longest)/4 {
		wrong = append(wrong, fmt.Sprintf("%d pauses lasted for only %v: these are no pauses", len(r.residuals), time.Duration(r.lost)))
	}
	if len(wrong) == 0 {
		return nil
	}
	return errors.New(strings.Join(wrong, "; "))
}

// trend is the slope of the drift, by least squares, in ns a million pauses.
func (r *result) trend() float64 {
	var xs, ys []float64
	for _, p := range r.points {
		xs, ys = append(xs, float64(p.pauses)), append(ys, float64(p.drift))
	}
	return measure.Slope(xs, ys) * 1e6
}

// quantile of the residuals' magnitudes, 0 to 1, ns.
func (r *result) quantile(q float64) int64 {
	of := make([]int64, len(r.residuals))
	for i, v := range r.residuals {
		of[i] = max(v, -v)
	}
	return measure.Quantile(of, q)
}

// String is a table in Markdown.
func (r *result) String() string {
	last, worst := r.points[len(r.points)-1], int64(0)
	for _, p := range r.points {
		worst = max(worst, p.drift, -p.drift)
	}
	s := &r.status
	return fmt.Sprintf(`| | |
| --- | --- |
| pauses | %d in %v, of 0 to %v |
| paused for, in all | %v |
| drift at the end, from outside | %+d ns |
| largest drift along the way, from outside | %d ns |
| trend | %+.0f ns a million pauses |
| guest saw its clock go back | %d times |
| QEMU's write dropped, anchored | %d, %d |
| module's residual at a stop: median, 99 %%, 99.99 %%, largest | %d, %d, %d, %d ns |
| anchors given up | %d |
| longest time in the module at a cont | %v |`,
		len(r.residuals), r.took.Round(time.Second), r.plan.longest, time.Duration(r.lost).Round(time.Millisecond), last.drift, worst, r.trend(),
		r.backsteps, s.Dropped, s.Anchored, r.quantile(0.5), r.quantile(0.99), r.quantile(0.9999), r.quantile(1), s.Reanchored, time.Duration(r.longCost))
}

// draw writes the picture: the drift over the pauses, and how often which residual was found.
func (r *result) draw(path string) error {
	course := measure.NewPlot(fmt.Sprintf("A guest's drift over %d pauses", len(r.residuals)), "pauses", "ns behind CLOCK_MONOTONIC_RAW")
	var xys plotter.XYs
	for _, p := range r.points {
		xys = append(xys, plotter.XY{X: float64(p.pauses), Y: float64(p.drift)})
	}
	dots, err := measure.Dots(xys)
	if err != nil {
		return err
	}
	course.Add(dots)
	course.Y.Min, course.Y.Max = min(course.Y.Min, -noise), max(course.Y.Max, noise)

	residuals := plot.New()
	residuals.Title.Text = "What the module found at the stops"
	residuals.X.Label.Text, residuals.Y.Label.Text = "ns that the kernel's clock was off the anchor", "pauses"
	const width = 20 // ns
	counts := map[int64]int{}
	for _, v := range r.residuals {
		counts[int64(math.Floor(float64(v)/width))]++
	}
	for bucket, n := range counts {
		// Bars on a logarithmic axis begin below 1.
		x := float64(bucket*width) + width/2
		line, err := plotter.NewLine(plotter.XYs{{X: x, Y: 0.5}, {X: x, Y: float64(n)}})
		if err != nil {
			return err
		}
		line.Color, line.Width = measure.Blue, vg.Points(1.5)
		residuals.Add(line)
	}
	residuals.Y.Scale, residuals.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: 0}
	residuals.Y.Min = 0.5
	return measure.WritePlots(path, course, residuals)
}
