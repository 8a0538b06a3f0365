package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/record"
	"ftclock/test/hang"

	"github.com/prometheus/client_golang/prometheus"
)

// A domain that was managed and runs without our metadata is told of, until somebody says that it is meant.
func TestForgottenDomains(t *testing.T) {
	oldStatus, oldRecords, oldShims := statusDir, records, shims
	statusDir, records, shims = t.TempDir(), t.TempDir(), t.TempDir()
	defer func() { statusDir, records, shims = oldStatus, oldRecords, oldShims }()
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	status := func(inner string) {
		t.Helper()
		text := `<domstatus state='running' reason='booted' pid='4711'><monitor path='/x' type='unix'/>` + inner + `</domstatus>`
		if err := os.WriteFile(filepath.Join(statusDir, "web1.xml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	plain := `<domain type='kvm' id='1'><name>web &amp; 1</name><uuid>` + uuid + `</uuid></domain>`
	check := func(when string, want int) {
		t.Helper()
		if got, err := forgottenDomains(); err != nil || len(got) != want {
			t.Errorf("%s: %+v, %v", when, got, err)
		}
		if got := checkForgotten(); len(got) != want {
			t.Errorf("%s, the doctor: %+v", when, got)
		}
	}
	status(plain)
	check("never managed", 0)
	if err := record.SetManaged(records, uuid, true); err != nil {
		t.Fatal(err)
	}
	check("its definition written anew", 1)
	lost, _ := forgottenDomains()
	if e := lost[0]; e.Name != "web & 1" || e.UUID != uuid || !e.bad() || !strings.Contains(e.Why, "ftclock enable --live 'web & 1'") {
		t.Errorf("%+v", e)
	}
	if e := withoutShim(found{name: "web & 1", uuid: uuid, id: "1", forgotten: &lost[0]}); e.State != forgotten {
		t.Errorf("status: %+v", e)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{dir: shims})
	if got := metricOf(t, registry, "ftclock_domain_uncorrected", "web & 1"); got != 1 {
		t.Errorf("the exporter says %v", got)
	}
	status(strings.Replace(plain, "</uuid>", `</uuid><metadata><ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/></metadata>`, 1))
	check("managed", 0)
	for _, junk := range []string{"", "<domain", plain + plain + strings.Repeat(" ", 100), strings.Replace(plain, uuid, "../..", 1)} {
		status(junk)
		_, _ = forgottenDomains()
	}
	status(strings.Replace(plain, uuid, "../..", 1))
	check("a UUID that is none", 0)
	status(plain)
	if err := os.Mkdir(filepath.Join(shims, uuid), 0o700); err != nil {
		t.Fatal(err)
	}
	check("served by enable --live", 0)
	if err := os.Remove(filepath.Join(shims, uuid)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := record.SetManaged(records, uuid, false); err != nil {
			t.Fatal(err)
		}
		check("disabled", 0)
	}
}

// metricOf is a domain's gauge.
func metricOf(t *testing.T, from prometheus.Gatherer, name, domain string) float64 {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && domain == "" {
				return m.GetGauge().GetValue()
			}
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == "domain" && l.GetValue() == domain {
					return m.GetGauge().GetValue()
				}
			}
		}
	}
	t.Fatalf("there is no %s of %s", name, domain)
	return 0
}

// A disk that hangs holds up neither a command nor the exporter, however often that is asked, and both say so.
func TestForgottenDomainsOnADiskThatHangs(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	statusDir, records, shims = t.TempDir(), hang.Dir(t), t.TempDir()
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	text := `<domstatus><domain type='kvm' id='1'><name>web1</name><uuid>` + uuid + `</uuid></domain></domstatus>`
	if err := os.WriteFile(filepath.Join(statusDir, "web1.xml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	threads := func() int {
		all, _ := os.ReadDir("/proc/self/task")
		return len(all)
	}
	if _, err := forgottenDomains(); err == nil || !strings.Contains(err.Error(), "its disk hangs") {
		t.Errorf("it says %v", err)
	}
	before := threads()
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{dir: shims})
	for range 100 {
		if got := metricOf(t, registry, "ftclock_records_readable", ""); got != 0 {
			t.Errorf("the exporter says %v", got)
		}
	}
	if n := threads(); n > before+20 {
		t.Errorf("%d threads after 100 scrapes, %d before", n, before)
	}
	if got := checkForgotten(); len(got) != 1 || got[0].grade != bad || !strings.Contains(got[0].what, "its disk hangs") {
		t.Errorf("the doctor says %+v", got)
	}
}
