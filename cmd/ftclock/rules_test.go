package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

const packaging = "../../packaging"

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func rules(t *testing.T) string {
	return readFile(t, filepath.Join(packaging, "prometheus/ftclock.rules.yml"))
}

// names gives what stands behind a key of a YAML file, each on a line of its own.
func names(text, key string) (all []string) {
	for _, found := range regexp.MustCompile(`(?m)^ +(?:- )?`+key+`: "?(.+?)"?$`).FindAllStringSubmatch(text, -1) {
		all = append(all, found[1])
	}
	return all
}

func TestRules(t *testing.T) {
	promtool(t, nil, "check", "rules", filepath.Join(packaging, "prometheus/ftclock.rules.yml"))
	promtool(t, nil, "test", "rules", filepath.Join(packaging, "prometheus/ftclock.rules.test.yml"))
	text, tests := rules(t), readFile(t, filepath.Join(packaging, "prometheus/ftclock.rules.test.yml"))
	alerts, recorded := names(text, "alert"), names(text, "record")
	if len(alerts) < 10 || len(recorded) < 10 {
		t.Fatalf("%d alerts, %d recording rules", len(alerts), len(recorded))
	}
	for _, alert := range alerts {
		if !regexp.MustCompile(`alertname: ` + alert + `\n +exp_alerts:\n +- exp_labels`).MatchString(tests) {
			t.Errorf("no test has %s go off", alert)
		}
	}
	for _, name := range recorded {
		if !strings.Contains(tests, "- expr: "+name+"\n") {
			t.Errorf("no test has a value of %s", name)
		}
	}
}

// Each alert leads to its heading in a page that the package installs.
func TestRunbooks(t *testing.T) {
	const installed = "file:///usr/share/doc/ftclock/"
	for _, block := range strings.Split(rules(t), "- alert: ")[1:] {
		alert, _, _ := strings.Cut(block, "\n")
		links := names(block, "runbook_url")
		if len(links) != 1 {
			t.Errorf("%s has the runbooks %q", alert, links)
			continue
		}
		name, ok := strings.CutPrefix(links[0], installed)
		page, heading, _ := strings.Cut(name, "#")
		if !ok || heading != strings.ToLower(alert) || !strings.Contains(readFile(t, filepath.Join("../../docs", page)), "\n### "+alert+"\n") {
			t.Errorf("%s: there is no heading %q where %s leads", alert, alert, links[0])
		}
	}
}

// dashboard is what the tests read of Grafana's.
type dashboard struct {
	Title, UID string
	Templating struct {
		List []struct {
			Name, Type string
			Query      json.RawMessage
		}
	}
	Panels []struct {
		ID                       int
		Type, Title, Description string
		GridPos                  struct{ X, Y, W, H int }
		Targets                  []struct{ Expr string }
	}
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(packaging, "grafana/ftclock.json"))), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// levels are the dashboard's expressions by the rows above them.
func (d dashboard) levels() map[string][]string {
	all, level := map[string][]string{}, ""
	for _, p := range d.Panels {
		if p.Type == "row" {
			level = p.Title
		}
		for _, q := range p.Targets {
			all[level] = append(all[level], q.Expr)
		}
	}
	return all
}

// The dashboard is one that Grafana can draw: each panel has a place and a query, and no variable is missing.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	variables := []string{"__rate_interval"}
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
	}
	taken, ids := map[[2]int]string{}, map[int]bool{}
	for _, p := range d.Panels {
		if p.Title == "" || p.Type != "row" && (len(p.Targets) == 0 || p.Description == "") || ids[p.ID] {
			t.Errorf("a panel without title, description, query or number of its own: %+v", p)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%q lies on %q, or outside, at column %d and line %d", p.Title, other, x, y)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for _, q := range p.Targets {
			for _, used := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(q.Expr, -1) {
				if !slices.Contains(variables, used[1]) {
					t.Errorf("%s: there is no variable %s", p.Title, used[1])
				}
			}
		}
	}
	levels := d.levels()
	for _, level := range []string{"Fleet", "Host: $instance", "Domains"} {
		if len(levels[level]) < 5 {
			t.Errorf("the level %s has the queries %q", level, levels[level])
		}
	}
	// The fleet level reads what is recorded: a few series a host, however many domains there are.
	for _, expr := range levels["Fleet"] {
		for _, name := range metricsIn(expr) {
			if strings.HasPrefix(name, "ftclock_") {
				t.Errorf("the fleet level reads each domain's %s: %s", name, expr)
			}
		}
	}
}

// What isn't a metric in an expression: strings, selectors, ranges and labels that are grouped by; then functions and numbers.
var (
	withLabels = regexp.MustCompile(`"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)`)
	notMetrics = regexp.MustCompile(`\w+ *\(|\b[0-9][0-9a-z.-]*`)
	metricName = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*`)
)

// metricsIn gives the names of the metrics and of the recording rules in an expression.
func metricsIn(expr string) (all []string) {
	expr = notMetrics.ReplaceAllString(withLabels.ReplaceAllString(expr, " "), " ")
	for _, name := range metricName.FindAllString(expr, -1) {
		if !slices.Contains([]string{"or", "and", "unless", "bool", "offset"}, name) {
			all = append(all, name)
		}
	}
	return all
}

func TestMetricsIn(t *testing.T) {
	for expr, want := range map[string]string{
		`sum by (job, le) (rate(a_total{x=~"b|c", d="e(f)"}[5m])) or vector(0)`: "a_total",
		`topk(10, i:a:b{j="k"} > 0) / on (x) group_left (y) z_1`:                "i:a:b z_1",
		`abs(a) > 100e-6`:                  "a",
		`up == 0 unless on(x) y offset 5m`: "up y",
	} {
		if got := strings.Join(metricsIn(expr), " "); got != want {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}

// exportedMetrics are the names of the exporter's metrics.
func exportedMetrics() map[string]bool {
	descs := make(chan *prometheus.Desc, 100)
	(&collector{}).Describe(descs)
	close(descs)
	known := map[string]bool{}
	for d := range descs {
		known[regexp.MustCompile(`fqName: "([^"]+)"`).FindStringSubmatch(d.String())[1]] = true
	}
	return known
}

// What dashboard and rules ask for parses, and is what the exporter has, what a rule records, or Prometheus' own `up`.
func TestDashboardAndRulesAskForWhatThereIs(t *testing.T) {
	metrics := exportedMetrics()
	known := map[string]bool{"up": true}
	for name := range metrics {
		known[name] = true
	}
	text := rules(t)
	for _, name := range names(text, "record") {
		known[name] = true
	}
	d := readDashboard(t)
	exprs := names(text, "expr")
	if want := strings.Count(text, "expr:"); len(exprs) != want {
		t.Fatalf("%d of %d expressions found", len(exprs), want)
	}
	for _, all := range d.levels() {
		exprs = append(exprs, all...)
	}
	for _, v := range d.Templating.List {
		if found := regexp.MustCompile(`label_values\((.+), \w+\)`).FindSubmatch(v.Query); v.Type == "query" && found != nil {
			exprs = append(exprs, strings.ReplaceAll(string(found[1]), `\"`, `"`))
		} else if v.Type == "query" {
			t.Errorf("the variable %s asks for %s", v.Name, v.Query)
		}
	}
	for _, expr := range exprs {
		all := metricsIn(expr)
		if len(all) == 0 {
			t.Errorf("no metric in %s", expr)
		}
		for _, name := range all {
			if !known[name] {
				t.Errorf("there is no metric %s: %s", name, expr)
			}
		}
	}
	promtool(t, nil, "check", "rules", asRules(t, exprs))
	// And every metric is documented, as is every rule.
	doc := readFile(t, "../../docs/monitoring.md")
	for name := range known {
		if name != "up" && !strings.Contains(doc, "`"+name+"`") {
			t.Errorf("docs/monitoring.md doesn't tell of %s", name)
		}
	}
}

// asRules makes a rule file of expressions, for promtool to parse them.
func asRules(t *testing.T, exprs []string) string {
	t.Helper()
	text := "groups: [{name: g, rules: ["
	for i, expr := range exprs {
		expr = strings.NewReplacer("$__rate_interval", "5m", "$job", ".*", "$instance", ".*", "$domain", ".*").Replace(expr)
		text += fmt.Sprintf("{record: 'a:b:c%d', expr: %q},\n", i, expr)
	}
	name := filepath.Join(t.TempDir(), "rule.yml")
	if err := os.WriteFile(name, []byte(text+"]}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
