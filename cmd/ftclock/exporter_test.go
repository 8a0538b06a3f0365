package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/test/hang"
)

// servedStatus is a status with another value in each of its figures.
func servedStatus() control.Status {
	return control.Status{
		Name: "web\x1b[2J", UUID: "11111111-1111-4111-8111-111111111111", Version: "fake 1", Mode: control.Relay, State: control.Correcting,
		Method: "ptrace", Workers: 3, Since: time.Unix(1_700_000_000, 0), Published: time.Unix(1_700_000_060, 0),
		GuestClock: control.KVMClock,
		Counts: clockpage.Counts{
			Pauses: 1000, Dropped: 980, Anchored: 10, Held: 7, Passed: 3, OverLimit: 2, Reanchored: 1, Orders: 990, StaleOrders: 4, Busy: 5,
			CaughtUp: 5_010_000_001, HeldTime: 2_000_000, PassedTime: 3_000_000, WorstResidual: 240, WorstCost: 9000,
		},
		Anchor:  clockpage.Anchor{Valid: 1, Error: 40},
		Records: []clockpage.Record{{Number: 1000, ResidualStop: -3, ContReal: 1_714_979_289_110_000_000}},
		Kept:    &control.RecordStatus{Pauses: 988, Missed: 12},
	}
}

func shimsIn(t *testing.T, all ...control.Status) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "shims") // short: a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, s := range all {
		f, err := fakeshim.Start(dir, s)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.Stop)
	}
	return dir
}

// exportedValues are the metrics of servedStatus, and of a shim that was killed.
func exportedValues() map[string]float64 {
	const web = "domain=web [2J,uuid=11111111-1111-4111-8111-111111111111"
	const lost = "domain=lost,uuid=55555555-5555-4555-8555-555555555555"
	const state = "ftclock_domain_state{domain=web [2J,state=%s,uuid=11111111-1111-4111-8111-111111111111}"
	return map[string]float64{
		"ftclock_pauses_total{decision=dropped," + web + "}":  980,
		"ftclock_pauses_total{decision=anchored," + web + "}": 10,
		"ftclock_pauses_total{decision=held," + web + "}":     7,
		"ftclock_pauses_total{decision=passed," + web + "}":   3,
		"ftclock_caught_up_seconds_total{" + web + "}":        5.010000001,
		"ftclock_held_seconds_total{" + web + "}":             0.002,
		"ftclock_passed_seconds_total{" + web + "}":           0.003,
		"ftclock_over_limit_pauses_total{" + web + "}":        2,
		"ftclock_reanchored_total{" + web + "}":               1,
		"ftclock_orders_total{" + web + "}":                   990,
		"ftclock_stale_orders_total{" + web + "}":             4,
		"ftclock_concurrent_calls_total{" + web + "}":         5,
		"ftclock_disagreements_total{" + web + "}":            0,
		"ftclock_shim_workers_total{" + web + "}":             3,
		"ftclock_last_residual_seconds{" + web + "}":          -3e-9,
		"ftclock_last_pause_timestamp_seconds{" + web + "}":   1_714_979_289.11,
		"ftclock_worst_residual_seconds{" + web + "}":         240e-9,
		"ftclock_worst_cost_seconds{" + web + "}":             9e-6,
		"ftclock_anchor_error_seconds{" + web + "}":           40e-9,
		"ftclock_served_since_timestamp_seconds{" + web + "}": 1_700_000_000,

		"ftclock_guest_clock{clock=kvmclock," + web + "}": 1,
		"ftclock_guest_clock{clock=none," + web + "}":     0,

		"ftclock_anchor_published_timestamp_seconds{" + web + "}": 1_700_000_060,

		"ftclock_recorded_pauses_total{" + web + "}":           988,
		"ftclock_missed_pauses_total{" + web + "}":             12,
		"ftclock_record_writable{" + web + "}":                 1,
		"ftclock_domain_uncorrected{" + web + "}":              0,
		"ftclock_domain_uncorrected{" + lost + "}":             1,
		"ftclock_shims{}":                                      2,
		"ftclock_shims_readable{}":                             1,
		"ftclock_build_info{version=" + programVersion() + "}": 1,
		"ftclock_domain_info{domain=web [2J,method=ptrace,mode=relay,uuid=11111111-1111-4111-8111-111111111111,version=fake 1}": 1,
		fmt.Sprintf(state, "correcting"): 1, fmt.Sprintf(state, "watching"): 0, fmt.Sprintf(state, "gone"): 0,
		"ftclock_domain_state{domain=lost,state=gone,uuid=55555555-5555-4555-8555-555555555555}": 1,
	}
}

func TestExporterValues(t *testing.T) {
	dir := shimsIn(t, servedStatus())
	if _, err := fakeshim.MakeDir(dir, control.Info{Name: "lost", UUID: "55555555-5555-4555-8555-555555555555", Mode: control.Relay}); err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(&collector{dirs: status.Dirs{Shims: dir}})
	got := gathered(t, registry)
	for name, want := range exportedValues() {
		v, found := got[name]
		if !found || math.Abs(v-want) > 1e-12*math.Abs(want) {
			t.Errorf("%s is %v (%t), want %v", name, v, found, want)
		}
	}
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("names: %v, %v", problems, err)
	}
}

// The whole command, scraped over HTTP, and looked at by promtool.
func TestExporterServes(t *testing.T) {
	dir := shimsIn(t, servedStatus())
	page := scrape(t, dir)
	for _, want := range []string{"# TYPE ftclock_pauses_total counter", "ftclock_host_clock_synchronised ", "go_goroutines"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in\n%s", want, page)
		}
	}
	promtool(t, strings.NewReader(page), "check", "metrics")
}

// scrape starts the exporter on a free port, gets its page, and ends it.
func scrape(t *testing.T, shims string) string {
	t.Helper()
	out := &firstLine{line: make(chan string, 1)}
	u := ui.New(out, io.Discard)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() {
		done <- (&exporterCmd{Listen: []string{"127.0.0.1:0"}}).Run(&program{UI: u, ctx: ctx, dirs: status.Dirs{Shims: shims}})
	}()
	var line string
	select {
	case line = <-out.line:
	case err := <-done:
		t.Fatal(err)
	}
	url := regexp.MustCompile(`http://\S+`).FindString(line)
	answer, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(answer.Body)
	answer.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatal(answer.Status, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return string(text)
}

// firstLine gives the first line that is written to it.
type firstLine struct {
	line chan string
	done bool
}

func (f *firstLine) Write(b []byte) (int, error) {
	if !f.done {
		f.done = true
		f.line <- string(b)
	}
	return len(b), nil
}

// promtool runs Prometheus' own checks.
func promtool(t *testing.T, in io.Reader, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		missing(t, "promtool; fix: apt-get install prometheus")
	}
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("ftclock_")) && args[1] == "metrics" {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// missing skips a test for what isn't installed; where everything must be, it fails.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("FTCLOCK_REQUIRE") != "" {
		t.Fatal("missing: " + what)
	}
	t.Skip("missing: " + what)
}

// gathered are all metrics by name{label=value,…}.
func gathered(t *testing.T, from prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			v := m.GetGauge().GetValue()
			if m.Counter != nil {
				v = m.GetCounter().GetValue()
			}
			got[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = v
		}
	}
	return got
}

// A disk that hangs doesn't hold the exporter up, however often that is asked, and it says so.
func TestExporterOnADiskThatHangs(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	at := status.Dirs{Libvirt: t.TempDir(), Records: hang.Dir(t), Shims: t.TempDir()}
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	text := `<domstatus><domain type='kvm' id='1'><name>web1</name><uuid>` + uuid + `</uuid></domain></domstatus>`
	if err := os.WriteFile(filepath.Join(at.Libvirt, "web1.xml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	threads := func() int {
		all, _ := os.ReadDir("/proc/self/task")
		return len(all)
	}
	if _, err := at.Forgotten(); err == nil || !strings.Contains(err.Error(), "its disk hangs") {
		t.Errorf("it says %v", err)
	}
	before := threads()
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{dirs: at})
	for range 100 {
		if got, found := gathered(t, registry)["ftclock_records_readable{}"]; !found || got != 0 {
			t.Errorf("the exporter says %v", got)
		}
	}
	if n := threads(); n > before+20 {
		t.Errorf("%d threads after 100 scrapes, %d before", n, before)
	}
}

func TestExporterTellsOfForgottenDomains(t *testing.T) {
	at := status.Dirs{Libvirt: t.TempDir(), Records: t.TempDir(), Shims: t.TempDir()}
	if err := fakeshim.Forget(at.Libvirt, at.Records, "web &amp; 1", fakeshim.UUID); err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{dirs: at})
	if got := gathered(t, registry)["ftclock_domain_uncorrected{domain=web & 1,uuid="+fakeshim.UUID+"}"]; got != 1 {
		t.Errorf("the exporter says %v", got)
	}
}
