package measure

import (
	"fmt"
	"slices"
	"time"
)

// number is what statistics are made of.
type number interface{ ~int64 | ~float64 }

// Quantile is the nearest rank of what was measured, for q from 0, the smallest, to 1, the largest; 0 of none.
func Quantile[T number](of []T, q float64) T {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Median is the value in the middle, or the mean of the two there; 0 of none.
func Median[T number](of []T) T {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return sorted[half-1] + (sorted[half]-sorted[half-1])/2
}

// Differences are those of two variants that were measured in turns, pair by pair, as far as both go.
func Differences[T number](a, b []T) []T {
	d := make([]T, min(len(a), len(b)))
	for i := range d {
		d[i] = a[i] - b[i]
	}
	return d
}

// Turns are the variants in the order of a round: whose turn is first finds other things in the caches than whose is last.
func Turns[V any](variants []V, round int) []V {
	n := round % len(variants)
	return slices.Concat(variants[n:], variants[:n])
}

// Slope is that of the straight line through the points, by least squares; 0 if there is none.
func Slope(xs, ys []float64) float64 {
	var n, sx, sy, sxx, sxy float64
	for i, x := range xs {
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+ys[i], sxx+x*x, sxy+x*ys[i]
	}
	if d := n*sxx - sx*sx; d > 0 {
		return (n*sxy - sx*sy) / d
	}
	return 0
}

// Micros is a duration in µs.
func Micros(d time.Duration) float64 { return float64(d) / 1e3 }

// Drift writes ns as a person reads them, with two decimals.
func Drift(ns int64) string {
	switch a := max(ns, -ns); {
	case a < 100_000:
		return fmt.Sprintf("%.2f µs", float64(ns)/1e3)
	case a < 100_000_000:
		return fmt.Sprintf("%.2f ms", float64(ns)/1e6)
	default:
		return fmt.Sprintf("%.2f s", float64(ns)/1e9)
	}
}
