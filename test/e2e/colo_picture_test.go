package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/measure"
)

// course is a guest's drift, in µs, over the seconds since COLO began: the primary's, and from died on the secondary's.
type course struct {
	delay int // between checkpoints, ms
	began time.Time
	drift plotter.XYs
	died  float64
}

// look adds what a guest's clock is behind by, from outside.
func (c *course) look(t *testing.T, clock *guest.Clock, before int64) {
	t.Helper()
	behind := offset(t, clock) - before
	c.drift = append(c.drift, plotter.XY{X: time.Since(c.began).Seconds(), Y: float64(behind) / 1e3})
}

// drawCourses draws them below one another where pictures are wanted (make pictures, make colo).
func drawCourses(t *testing.T, courses []*course) {
	t.Helper()
	dir := os.Getenv("FTCLOCK_PICTURES")
	if dir == "" {
		return
	}
	var plots []*plot.Plot
	for _, c := range courses {
		p := measure.NewPlot(fmt.Sprintf("COLO with a checkpoint delay of %d ms: the primary's guest, then the secondary's", c.delay), "s", "µs behind")
		p.Y.Min, p.Y.Max = -maxDrift/1e3, maxDrift/1e3
		dots := check.Value(measure.Dots(c.drift))(t)
		failover := check.Value(plotter.NewLine(plotter.XYs{{X: c.died, Y: p.Y.Min}, {X: c.died, Y: p.Y.Max}}))(t)
		failover.Color, failover.Dashes = measure.Vermilion, []vg.Length{vg.Points(4), vg.Points(3)}
		p.Add(dots, failover)
		p.Legend.Top = true
		p.Legend.Add("seen from outside", dots)
		p.Legend.Add("the primary is killed", failover)
		plots = append(plots, p)
	}
	if err := measure.WritePlots(filepath.Join(dir, "colo.svg"), plots...); err != nil {
		t.Error(err)
	}
}
