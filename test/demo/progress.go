package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// progress shows how far a run is: a bar on a terminal, a line now and then elsewhere.
type progress struct {
	w    io.Writer
	bar  *progressbar.ProgressBar // nil: lines
	name string
}

// newProgress shows on f.
func newProgress(f *os.File) *progress {
	p := &progress{w: f}
	if term.IsTerminal(int(f.Fd())) {
		p.bar = progressbar.NewOptions(checkpoints,
			progressbar.OptionSetWriter(f),
			progressbar.OptionSetWidth(30),
			progressbar.OptionShowCount(),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionThrottle(100*time.Millisecond),
		)
	}
	return p
}

func (p *progress) begin(name string) {
	p.name = name
	if p.bar == nil {
		fmt.Fprintf(p.w, "%-7s  making %d checkpoints\n", name, checkpoints)
		return
	}
	p.step(0, 0)
}

// step tells that n checkpoints are made and what the drift is, in ns.
func (p *progress) step(n int, drift int64) {
	text := fmt.Sprintf("%-7s  guest's clock lost %8s ms", p.name, fixed(ms(drift), 1))
	switch {
	case p.bar != nil:
		p.bar.Describe(text)
		_ = p.bar.Set(n)
	case n%(checkpoints/4) == 0:
		fmt.Fprintf(p.w, "%s  (%d of %d)\n", text, n, checkpoints)
	}
}

func (p *progress) finish() {
	if p.bar != nil {
		_ = p.bar.Exit()
		fmt.Fprintln(p.w)
	}
}
