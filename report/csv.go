package report

import (
	"encoding/csv"
	"io"
	"strconv"
	"time"
)

// header names the columns. Times are RFC 3339 in UTC.
var header = []string{"kind", "from", "to", "pauses", "missed", "lost_ns", "caught_up_ns", "held_ns", "passed_ns", "residual_min_ns", "residual_median_ns",
	"residual_p99_magnitude_ns", "residual_max_ns", "state", "reference", "host_synchronised", "host_offset_ns", "host_estimated_error_ns", "host_maximum_error_ns", "why"}

// WriteCSV writes a row for each stretch (kind "corrected", "uncorrected", "not known", "off"), each gap ("gap: " and its kind), and
// each minute with pauses ("minute"). A minute without a row had no pause if its stretch is corrected. Of stretches only kind, from
// and to are filled in, of gaps also pauses and why.
func (p *Report) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	_ = out.Write(header) // errors are kept for Flush
	i := func(v int64) string { return strconv.FormatInt(v, 10) }
	u := func(v uint64) string { return strconv.FormatUint(v, 10) }
	row := func(kind string, from, to time.Time, rest ...string) {
		all := make([]string, len(header))
		copy(all, append([]string{kind, from.UTC().Format(time.RFC3339Nano), to.UTC().Format(time.RFC3339Nano)}, rest...))
		_ = out.Write(all)
	}
	for _, s := range p.Stretches {
		row(string(s.Kind), s.From, s.To)
	}
	for _, g := range p.Gaps {
		rest := make([]string, len(header)-3)
		rest[0], rest[len(rest)-1] = u(g.Pauses), g.Why
		row("gap: "+g.Kind, g.From, g.To, rest...)
	}
	for n := range p.Minutes {
		m := &p.Minutes[n]
		var missed uint64
		for _, x := range m.Missed {
			missed += x.Count
		}
		rest := []string{u(m.Pauses), u(missed), u(m.Lost), u(m.CaughtUp), u(m.Held), u(m.Passed)}
		if d := m.Residual; d.Count > 0 {
			rest = append(rest, i(d.Min), i(d.Median()), i(d.P99()), i(d.Max))
		} else {
			rest = append(rest, "", "", "", "")
		}
		rest = append(rest, m.State, m.Reference)
		if h := m.Host; h.Samples > 0 {
			rest = append(rest, strconv.FormatBool(h.Synchronised), i(h.Offset), i(h.EstimatedError), i(h.MaximumError))
		}
		row("minute", m.Start, m.Start.Add(time.Minute), rest...)
	}
	out.Flush()
	return out.Error()
}
