package record

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// digits is how exact a histogram is: its values are told apart if they differ in the first two significant digits, in
// fact by less than 1 %. Below 256 ns each value has a bucket of its own.
const (
	digits   = 2
	histTop  = int64(10e9) // ns; what is above counts as this. Min and Max are exact all the same.
	histBase = 1
)

// Distribution tells how values, in ns, were distributed. Min, Max and Sum are exact; the buckets hold each value to
// within 1 %.
type Distribution struct {
	Count   uint64
	Min     int64
	Max     int64
	Sum     int64
	Buckets []Bucket // ascending
}

// Bucket counts values that are alike; Value is the one among them that is nearest to 0.
type Bucket struct {
	Value int64
	Count uint64
}

// Quantile gives the value below or at which that part of all values lies, q from 0 to 1. 0 without any value.
func (d Distribution) Quantile(q float64) int64 {
	want := uint64(math.Ceil(q * float64(d.Count)))
	var seen uint64
	for _, b := range d.Buckets {
		if seen += b.Count; seen >= want && seen > 0 {
			return min(max(b.Value, d.Min), d.Max)
		}
	}
	return d.Max
}

// Median is Quantile(0.5).
func (d Distribution) Median() int64 { return d.Quantile(0.5) }

// Magnitudes is the distribution of the values without their signs.
func (d Distribution) Magnitudes() Distribution {
	all := make(map[int64]uint64)
	for _, b := range d.Buckets {
		all[abs(b.Value)] += b.Count
	}
	m := Distribution{Count: d.Count, Max: max(abs(d.Min), abs(d.Max))}
	for v, n := range all {
		m.Buckets = append(m.Buckets, Bucket{v, n})
		m.Sum += v * int64(n)
	}
	sort.Slice(m.Buckets, func(i, j int) bool { return m.Buckets[i].Value < m.Buckets[j].Value })
	if len(m.Buckets) > 0 {
		m.Min = m.Buckets[0].Value
	}
	return m
}

// Worst is the largest magnitude, exact.
func (d Distribution) Worst() int64 { return max(abs(d.Min), abs(d.Max)) }

// P99 is the magnitude below which 99 of 100 values are.
func (d Distribution) P99() int64 { return d.Magnitudes().Quantile(0.99) }

func abs(v int64) int64 {
	if v < 0 {
		return -v
	}
	return v
}

// Merge is the distribution of both's values.
func (d Distribution) Merge(o Distribution) Distribution {
	switch {
	case d.Count == 0:
		return o
	case o.Count == 0:
		return d
	}
	m := Distribution{Count: d.Count + o.Count, Min: min(d.Min, o.Min), Max: max(d.Max, o.Max), Sum: d.Sum + o.Sum}
	a, b := d.Buckets, o.Buckets
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].Value < b[0].Value:
			m.Buckets, a = append(m.Buckets, a[0]), a[1:]
		case len(a) == 0 || b[0].Value < a[0].Value:
			m.Buckets, b = append(m.Buckets, b[0]), b[1:]
		default:
			m.Buckets = append(m.Buckets, Bucket{a[0].Value, a[0].Count + b[0].Count})
			a, b = a[1:], b[1:]
		}
	}
	return m
}

type distributionJSON struct {
	Count   uint64     `json:"count"`
	Min     int64      `json:"min"`
	Max     int64      `json:"max"`
	Sum     int64      `json:"sum"`
	Buckets [][2]int64 `json:"buckets"` // value, count
}

// MarshalJSON writes the buckets as pairs.
func (d Distribution) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 64+16*len(d.Buckets))
	b = appendInt(append(b, `{"count":`...), int64(d.Count))
	b = appendInt(append(b, `,"min":`...), d.Min)
	b = appendInt(append(b, `,"max":`...), d.Max)
	b = appendInt(append(b, `,"sum":`...), d.Sum)
	b = append(b, `,"buckets":[`...)
	for i, bucket := range d.Buckets {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendInt(append(b, '['), bucket.Value)
		b = appendInt(append(b, ','), int64(bucket.Count))
		b = append(b, ']')
	}
	return append(b, `]}`...), nil
}

// UnmarshalJSON reads them, and refuses counts that don't add up.
func (d *Distribution) UnmarshalJSON(text []byte) error {
	var j distributionJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*d = Distribution{Count: j.Count, Min: j.Min, Max: j.Max, Sum: j.Sum}
	var n uint64
	for _, pair := range j.Buckets {
		if pair[1] <= 0 {
			return fmt.Errorf("a bucket of %d values", pair[1])
		}
		n += uint64(pair[1])
		d.Buckets = append(d.Buckets, Bucket{pair[0], uint64(pair[1])})
	}
	if n != d.Count {
		return fmt.Errorf("%d values in buckets, %d in all", n, d.Count)
	}
	if !slices.IsSortedFunc(d.Buckets, func(a, b Bucket) int { return cmp.Compare(a.Value, b.Value) }) {
		return fmt.Errorf("buckets out of order")
	}
	return nil
}

func appendInt(b []byte, v int64) []byte { return strconv.AppendInt(b, v, 10) }

// histogram collects a Distribution: one HdrHistogram for each sign.
type histogram struct {
	positive, negative *hdrhistogram.Histogram // negative is made when it is needed
	count              uint64
	min, max, sum      int64
}

func newHistogram() *histogram {
	return &histogram{positive: hdrhistogram.New(histBase, histTop, digits)}
}

func (h *histogram) add(v int64, n uint64) {
	if h.count == 0 {
		h.min, h.max = v, v
	}
	h.min, h.max = min(h.min, v), max(h.max, v)
	h.count += n
	h.sum += v * int64(n)
	side := h.positive
	if v < 0 {
		if h.negative == nil {
			h.negative = hdrhistogram.New(histBase, histTop, digits)
		}
		side = h.negative
	}
	_ = side.RecordValues(min(abs(v), histTop), int64(n)) // it fails above histTop alone
}

func (h *histogram) reset() {
	h.positive.Reset()
	if h.negative != nil {
		h.negative.Reset()
	}
	h.count, h.min, h.max, h.sum = 0, 0, 0, 0
}

// restore begins with a distribution that an earlier worker had.
func (h *histogram) restore(d Distribution) {
	h.reset()
	for _, b := range d.Buckets {
		h.add(b.Value, b.Count)
	}
	h.count, h.min, h.max, h.sum = d.Count, d.Min, d.Max, d.Sum
}

func (h *histogram) distribution() Distribution {
	d := Distribution{Count: h.count, Min: h.min, Max: h.max, Sum: h.sum}
	if h.negative != nil && h.negative.TotalCount() > 0 {
		for _, bar := range slices.Backward(h.negative.Distribution()) {
			if bar.Count > 0 {
				d.Buckets = append(d.Buckets, Bucket{-bar.From, uint64(bar.Count)})
			}
		}
	}
	for _, bar := range h.positive.Distribution() {
		if bar.Count > 0 {
			d.Buckets = append(d.Buckets, Bucket{bar.From, uint64(bar.Count)})
		}
	}
	return d
}
