// Package grafana has tests alone: of the dashboard beside it.
package grafana

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/bargauge"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"

	"ftclock/test/check"
)

// strict decodes by Grafana's own schema, as its foundation SDK has it: no field may be unknown, of another type, or missing.
func strict(of interface{ UnmarshalJSONStrict([]byte) error }, text []byte) error {
	err := of.UnmarshalJSONStrict(text)
	var found cog.BuildErrors
	if errors.As(err, &found) && len(found) == 0 { // what it returns where all is well
		return nil
	}
	return err
}

// panel is what the checks beyond the schema read of one.
type panel struct {
	Type, Title string
	Targets     []json.RawMessage
	FieldConfig json.RawMessage
}

// validate checks a dashboard by the schemas of dashboards, and of the kinds of panels and of queries that ours has.
//
// The SDK has the settings' values, such as a panel's colour mode, as plain strings, and the options of transformations and of
// overrides as anything: what is wrong in those isn't seen.
func validate(text []byte) error {
	runtime := cog.NewRuntime()
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())
	runtime.RegisterPanelcfgVariant(bargauge.VariantConfig())
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(table.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	//lint:ignore SA1019 Grafana reads this format in all its versions, and the newer one in the newest alone
	var d dashboard.Dashboard
	if err := strict(&d, text); err != nil {
		return err
	}
	if err := d.Validate(); err != nil {
		return err
	}
	// What the SDK takes as it is: a kind of panel or of query without a registered schema, and the fields' configuration.
	var raw struct{ Panels []panel }
	if err := json.Unmarshal(text, &raw); err != nil {
		return err
	}
	for _, p := range raw.Panels {
		if _, known := runtime.ConfigForPanelcfgVariant(p.Type); !known && p.Type != "row" {
			return fmt.Errorf("panel %q: no schema of the kind %q is registered", p.Title, p.Type)
		}
		if p.FieldConfig != nil {
			if err := strict(&dashboard.FieldConfigSource{}, p.FieldConfig); err != nil {
				return fmt.Errorf("panel %q: fieldConfig: %w", p.Title, err)
			}
		}
		for _, target := range p.Targets {
			var q prometheus.Dataquery
			if err := strict(&q, target); err != nil {
				return fmt.Errorf("panel %q: %w", p.Title, err)
			}
			if q.Expr == "" {
				return fmt.Errorf("panel %q: a query asks for nothing", p.Title)
			}
		}
	}
	return nil
}

func TestDashboard(t *testing.T) {
	text := check.Value(os.ReadFile("ftclock.json"))(t)
	if err := validate(text); err != nil {
		t.Error(err)
	}
}

// What is wrong is seen.
func TestDashboardsThatAreWrong(t *testing.T) {
	good := string(check.Value(os.ReadFile("ftclock.json"))(t))
	for _, c := range []struct{ before, after, want string }{
		{`"title": "ftclock: guests' clocks"`, `"titel": "ftclock"`, "titel"},
		{`"schemaVersion": 39`, `"schemaVersion": "39"`, "schemaVersion"},
		{`  "annotations": {`, `  "notes": {`, "annotations"},
		{`"type": "datasource"`, `"typ": "datasource"`, "typ"},
		{`"multi": true`, `"multi": "yes"`, "templating"},
		{`"refresh": 2`, `"refreshes": 2`, "refreshes"},
		{`"collapsed": false`, `"folded": false`, "folded"},
		{`"type": "stat"`, `"type": "stats"`, `"stats"`},
		{`"type": "stat"`, `"kind": "stat"`, "type"},
		{`"description": "Hosts whose exporter answers."`, `"describes": ""`, "describes"},
		{`"w": 4`, `"w": "4"`, "gridPos"},
		{`"w": 4`, `"width": 4`, "width"},
		{`"targets": [`, `"queries": [`, "queries"},
		{`"expr": "sum(job:ftclock_hosts:count{job=~\"$job\"})"`, `"expression": ""`, "expression"},
		{`"expr": "sum(job:ftclock_hosts:count{job=~\"$job\"})"`, `"expr": ""`, "asks for nothing"},
		{`"refId": "A"`, `"reference": "A"`, "reference"},
		{`"instant": true`, `"instant": "true"`, "instant"},
		{`"fieldConfig": {`, `"fields": {`, "fields"},
		{`"unit": "short"`, `"units": "short"`, "units"},
		{`"thresholds": {`, `"threshold": {`, "threshold"},
		{`"steps": [`, `"step": [`, "step"},
		{`"color": "red"`, `"colour": "red"`, "colour"},
		{`"matcher": {`, `"match": {`, "match"},
		{`"graphMode": "area"`, `"graph": "area"`, "graph"},
		{`"lastNotNull"`, `1`, "reduceOptions"},
		{`"showLegend": true`, `"showsLegend": true`, "showsLegend"},
		{`"showHeader": true`, `"showHeader": "true"`, "showHeader"},
		{`"minVizWidth": 8`, `"minVizWidth": "8"`, "minVizWidth"},
		{`"transformations": [`, `"transforms": [`, "transforms"},
	} {
		wrong := strings.Replace(good, c.before, c.after, 1)
		if wrong == good {
			t.Errorf("it has no %s", c.before)
		} else if err := validate([]byte(wrong)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("with %s: %v, want %q", c.after, err, c.want)
		}
	}
}
