package measure

import (
	"math"
	"slices"
	"testing"
)

func TestFigures(t *testing.T) {
	if Median[float64](nil) != 0 || Median([]float64{3, 1, 2}) != 2 || Quantile([]float64{3, 1, 2}, 0) != 1 || Quantile([]float64{3, 1, 2}, 1) != 3 {
		t.Error("quantiles are wrong")
	}
	if got := Turns([]int{1, 2, 3}, 4); !slices.Equal(got, []int{2, 3, 1}) {
		t.Errorf("the second round's turns %v", got)
	}
	if got := Slope([]float64{0, 1, 2}, []float64{1, 3, 5}); got != 2 || Slope([]float64{1}, []float64{1}) != 0 {
		t.Errorf("slope %v", got)
	}
	if d := Differences([]float64{5, 6, 7}, []float64{1, 1}); len(d) != 2 || d[0] != 4 || d[1] != 5 {
		t.Errorf("differences %v", d)
	}
	for ns, want := range map[int64]string{-1234: "-1.23 µs", 1_500_000: "1.50 ms", 60_780_000_000: "60.78 s", 0: "0.00 µs"} {
		if got := Drift(ns); got != want {
			t.Errorf("%d ns are %s, want %s", ns, got, want)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []int64
		want int64
	}{
		{nil, 0}, {[]int64{7}, 7}, {[]int64{9, 1}, 5}, {[]int64{5, 1, 3}, 3}, {[]int64{4, 1, 2, 1000}, 3},
		{[]int64{-3, -1}, -2}, {[]int64{math.MaxInt64, math.MaxInt64 - 2}, math.MaxInt64 - 1},
	} {
		before := append([]int64(nil), c.of...)
		if got := Median(c.of); got != c.want {
			t.Errorf("median of %v: %d, want %d", c.of, got, c.want)
		}
		if !slices.Equal(before, c.of) {
			t.Errorf("median changed %v to %v", before, c.of)
		}
	}
}
