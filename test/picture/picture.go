// Package picture writes plots, one below the other, into a file. It is for the programs that measure.
package picture

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"os"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Colours of the palette of Okabe and Ito, which the colour-blind can tell apart.
var (
	Vermilion = color.RGBA{R: 0xd5, G: 0x5e, A: 0xff}
	Blue      = color.RGBA{G: 0x72, B: 0xb2, A: 0xff}
	Green     = color.RGBA{G: 0x9e, B: 0x73, A: 0xff}
	Orange    = color.RGBA{R: 0xe6, G: 0x9f, A: 0xff}
	Purple    = color.RGBA{R: 0xcc, G: 0x79, B: 0xa7, A: 0xff}
	Grey      = color.RGBA{R: 0x66, G: 0x66, B: 0x66, A: 0xff}
)

const (
	width      = 9 * vg.Inch
	height     = 3.6 * vg.Inch // of each plot
	resolution = 144           // of a PNG, dots an inch
)

// Write draws the plots, at the left edge one below the other, into an .svg or a .png.
func Write(path string, plots ...*plot.Plot) error {
	h := height * vg.Length(len(plots))
	var to io.WriterTo
	var canvas draw.Canvas
	switch filepath.Ext(path) {
	case ".svg":
		c := vgsvg.New(width, h)
		to, canvas = c, draw.New(c)
	case ".png":
		c := vgimg.NewWith(vgimg.UseWH(width, h), vgimg.UseDPI(resolution))
		to, canvas = vgimg.PngCanvas{Canvas: c}, draw.New(c)
	default:
		return fmt.Errorf("drawing %s: only .svg and .png are known", path)
	}
	canvas.FillPolygon(color.White, []vg.Point{{}, {X: width}, {X: width, Y: h}, {Y: h}})
	table := make([][]*plot.Plot, len(plots))
	for i, p := range plots {
		table[i] = []*plot.Plot{p}
	}
	tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadX: vg.Points(14), PadY: vg.Points(14), PadTop: vg.Points(14), PadBottom: vg.Points(14),
		PadLeft: vg.Points(14), PadRight: vg.Points(24)}
	for i, row := range plot.Align(table, tiles, canvas) {
		plots[i].Draw(row[0])
	}
	var out bytes.Buffer
	if _, err := to.WriteTo(&out); err != nil {
		return fmt.Errorf("drawing %s: %w", path, err)
	}
	// The font isn't in the file; these have the same widths.
	text := bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	return os.WriteFile(path, text, 0o644)
}
