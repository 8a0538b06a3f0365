package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// quantile of what was measured, q from 0 to 1; 0 of none.
func quantile(of []float64, q float64) float64 {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func median(of []float64) float64 { return quantile(of, 0.5) }

// differences of two rows that were measured in turns, pair by pair.
func differences(a, b []float64) []float64 {
	d := make([]float64, min(len(a), len(b)))
	for i := range d {
		d[i] = a[i] - b[i]
	}
	return d
}

// drift writes ns as a person reads them.
func drift(ns int64) string {
	switch a := max(ns, -ns); {
	case a < 100_000:
		return fmt.Sprintf("%.2f µs", float64(ns)/1e3)
	case a < 100_000_000:
		return fmt.Sprintf("%.2f ms", float64(ns)/1e6)
	default:
		return fmt.Sprintf("%.2f s", float64(ns)/1e9)
	}
}

func micros(d time.Duration) float64 { return float64(d) / 1e3 }

// table is one of Markdown.
type table struct{ strings.Builder }

func newTable(head ...string) *table {
	t := &table{}
	t.row(head...)
	t.row(slices.Repeat([]string{"---"}, len(head))...)
	return t
}

func (t *table) row(cells ...string) { t.WriteString("| " + strings.Join(cells, " | ") + " |\n") }
