package status

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/record"
)

// A domain that was managed and runs without our metadata is told of, until somebody says that it is meant.
func TestForgottenDomains(t *testing.T) {
	at := Dirs{Libvirt: t.TempDir(), Records: t.TempDir(), Shims: t.TempDir()}
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	status := func(inner string) {
		t.Helper()
		text := `<domstatus state='running' reason='booted' pid='4711'><monitor path='/x' type='unix'/>` + inner + `</domstatus>`
		if err := os.WriteFile(filepath.Join(at.Libvirt, "web1.xml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	plain := `<domain type='kvm' id='1'><name>web &amp; 1</name><uuid>` + uuid + `</uuid></domain>`
	check := func(when string, want int) {
		t.Helper()
		if got, err := at.Forgotten(); err != nil || len(got) != want {
			t.Errorf("%s: %+v, %v", when, got, err)
		}
	}
	status(plain)
	check("never managed", 0)
	if err := record.SetManaged(at.Records, uuid, true); err != nil {
		t.Fatal(err)
	}
	check("its definition written anew", 1)
	lost, _ := at.Forgotten()
	if e := lost[0]; e.Name != "web & 1" || e.UUID != uuid || !e.Bad() || !strings.Contains(e.Why, "ftclock enable --live 'web & 1'") {
		t.Errorf("%+v", e)
	}
	if e := at.WithoutShim(Known{Name: "web & 1", UUID: uuid, ID: "1", forgotten: &lost[0]}); e.State != Forgotten {
		t.Errorf("status: %+v", e)
	}
	status(strings.Replace(plain, "</uuid>", `</uuid><metadata><ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/></metadata>`, 1))
	check("managed", 0)
	for _, junk := range []string{"", "<domain", plain + plain + strings.Repeat(" ", 100), strings.Replace(plain, uuid, "../..", 1)} {
		status(junk)
		_, _ = at.Forgotten()
	}
	status(strings.Replace(plain, uuid, "../..", 1))
	check("a UUID that is none", 0)
	status(plain)
	if err := os.Mkdir(filepath.Join(at.Shims, uuid), 0o700); err != nil {
		t.Fatal(err)
	}
	check("served by enable --live", 0)
	if err := os.Remove(filepath.Join(at.Shims, uuid)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := record.SetManaged(at.Records, uuid, false); err != nil {
			t.Fatal(err)
		}
		check("disabled", 0)
	}
}
