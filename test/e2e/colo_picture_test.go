package e2e

import (
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

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
		p := plot.New()
		p.Title.Text = fmt.Sprintf("COLO with a checkpoint delay of %d ms: the primary's guest, then the secondary's", c.delay)
		p.X.Label.Text, p.Y.Label.Text = "s", "µs behind"
		p.Y.Min, p.Y.Max = -maxDrift/1e3, maxDrift/1e3
		dots, err := plotter.NewScatter(c.drift)
		if err != nil {
			t.Fatal(err)
		}
		dots.Color, dots.Radius = measure.Blue, vg.Points(2)
		failover, err := plotter.NewLine(plotter.XYs{{X: c.died, Y: p.Y.Min}, {X: c.died, Y: p.Y.Max}})
		if err != nil {
			t.Fatal(err)
		}
		failover.Color, failover.Dashes = color.Color(measure.Vermilion), []vg.Length{vg.Points(4), vg.Points(3)}
		p.Add(plotter.NewGrid(), dots, failover)
		p.Legend.Top = true
		p.Legend.Add("seen from outside", dots)
		p.Legend.Add("the primary is killed", failover)
		plots = append(plots, p)
	}
	if err := measure.WritePlots(filepath.Join(dir, "colo.svg"), plots...); err != nil {
		t.Error(err)
	}
}
