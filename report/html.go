package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"time"
)

//go:embed report.html
var page string

var pageTemplate = template.Must(template.New("report").Funcs(template.FuncMap{
	"ns":       nanoseconds,
	"uns":      func(v uint64) string { return nanoseconds(int64(v)) },
	"number":   Number,
	"duration": duration,
	"percent":  percent,
	"at":       func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
	"minute":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04") },
}).Parse(page))

// percent never rounds up to 100.
func percent(part float64) string {
	switch {
	case part == 1:
		return "100 %"
	case part > 0.9999:
		return "more than 99.99 %"
	}
	return fmt.Sprintf("%.2f %%", part*100)
}

// maxGapsShown bounds the page's table; JSON and CSV have all.
const maxGapsShown = 200

// WriteHTML writes one page that needs nothing else: no network, no script.
func (p *Report) WriteHTML(w io.Writer) error {
	type limit struct{ Limit, Who, Verdict string }
	var limits []limit
	for _, l := range Limits {
		limits = append(limits, limit{nanoseconds(int64(l.Limit)), l.Who, p.Statement.Verdict(l.Limit)})
	}
	gaps := p.Gaps[:min(len(p.Gaps), maxGapsShown)]
	return pageTemplate.Execute(w, struct {
		*Report
		Limits                    []limit
		Shown                     []Gap
		NotShown                  int
		Drift, Near, Spread, Rate Plot
	}{p, limits, gaps, len(p.Gaps) - len(gaps), p.drift(), p.near(), p.spread(), p.rate()})
}
