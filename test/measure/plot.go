package measure

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"os"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Colours of the palette of Okabe and Ito, which the colour-blind can tell apart.
var (
	Vermilion = color.RGBA{R: 0xd5, G: 0x5e, A: 0xff}
	Orange    = color.RGBA{R: 0xe6, G: 0x9f, A: 0xff}
	Blue      = color.RGBA{G: 0x72, B: 0xb2, A: 0xff}
	Green     = color.RGBA{G: 0x9e, B: 0x73, A: 0xff}
	Purple    = color.RGBA{R: 0xcc, G: 0x79, B: 0xa7, A: 0xff}

	// Palette has them in the order in which curves take them.
	Palette = []color.Color{Vermilion, Orange, Blue, Green, Purple}
)

// Width is that of a picture.
const Width = 9 * vg.Inch

const (
	height     = 3.6 * vg.Inch // of each plot
	resolution = 144           // of a PNG, dots an inch
)

// NewPlot is an empty plot with a grid.
func NewPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Add(plotter.NewGrid())
	return p
}

// Curve gives a line and the dots on it, both in that colour.
func Curve(points plotter.XYs, colour color.Color, shape draw.GlyphDrawer) (*plotter.Line, *plotter.Scatter, error) {
	line, dots, err := plotter.NewLinePoints(points)
	if err != nil {
		return nil, nil, err
	}
	line.Color, line.Width = colour, vg.Points(1.4)
	dots.Color, dots.Shape, dots.Radius = colour, shape, vg.Points(3)
	return line, dots, nil
}

// Dots gives blue dots alone.
func Dots(points plotter.XYs) (*plotter.Scatter, error) {
	dots, err := plotter.NewScatter(points)
	if err != nil {
		return nil, err
	}
	dots.Color, dots.Shape, dots.Radius = Blue, draw.CircleGlyph{}, vg.Points(2)
	return dots, nil
}

// WritePlots draws the plots, at the left edge one below the other, into an .svg or a .png.
func WritePlots(path string, plots ...*plot.Plot) error {
	return WritePicture(path, height*vg.Length(len(plots)), func(canvas draw.Canvas) {
		table := make([][]*plot.Plot, len(plots))
		for i, p := range plots {
			table[i] = []*plot.Plot{p}
		}
		const pad = 14
		tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadX: pad, PadY: pad, PadTop: pad, PadBottom: pad, PadLeft: pad, PadRight: 24}
		for i, row := range plot.Align(table, tiles, canvas) {
			plots[i].Draw(row[0])
		}
	})
}

// WritePicture has compose draw on a white canvas of that height, and writes it as an .svg or a .png.
func WritePicture(path string, height vg.Length, compose func(draw.Canvas)) error {
	var to io.WriterTo
	var canvas draw.Canvas
	switch filepath.Ext(path) {
	case ".svg":
		c := vgsvg.New(Width, height)
		to, canvas = c, draw.New(c)
	case ".png":
		c := vgimg.NewWith(vgimg.UseWH(Width, height), vgimg.UseDPI(resolution))
		to, canvas = vgimg.PngCanvas{Canvas: c}, draw.New(c)
	default:
		return fmt.Errorf("drawing %s: only .svg and .png are known", path)
	}
	canvas.FillPolygon(color.White, []vg.Point{{}, {X: Width}, {X: Width, Y: height}, {Y: height}})
	compose(canvas)
	var out bytes.Buffer
	if _, err := to.WriteTo(&out); err != nil {
		return fmt.Errorf("drawing %s: %w", path, err)
	}
	// The font isn't in the file; these have the same widths.
	text := bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	return os.WriteFile(path, text, 0o644)
}
