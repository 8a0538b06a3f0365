package metadata

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/check"
)

// snippets are the examples to paste into a domain, by name.
func snippets(t *testing.T) map[string]string {
	t.Helper()
	files := check.Value(filepath.Glob("snippets/*.xml"))(t)
	if len(files) == 0 {
		t.Fatal("no snippets")
	}
	all := map[string]string{}
	for _, file := range files {
		all[strings.TrimSuffix(filepath.Base(file), ".xml")] = string(check.Value(os.ReadFile(file))(t))
	}
	return all
}

func TestSnippets(t *testing.T) {
	want := map[string]Policy{
		"catch-up-all":     policy(func(p *Policy) { p.Suspend, p.Restore = Rule{CatchUp, MaxLimit}, Rule{CatchUp, MaxLimit} }),
		"checkpoint-limit": policy(func(p *Policy) { p.Checkpoint.Limit = 500e6 }),
		"defaults":         Default(),
		"minimal":          Default(),
		"monitor-direct":   policy(func(p *Policy) { p.Monitor = Direct }),
		"not-required":     policy(func(p *Policy) { p.Required = false }),
		"utc":              policy(func(p *Policy) { p.Reference = UTC }),
		"utc-slowly":       policy(func(p *Policy) { p.Reference, p.Slew = UTC, 50 }),
	}
	for name, snippet := range snippets(t) {
		if name == "preload" {
			d, err := Parse([]byte("<domain>\n" + snippet + "</domain>"))
			if err != nil || !d.Preload || d.Policy != nil {
				t.Errorf("%s: got %+v, %v", name, d, err)
			}
			continue
		}
		d, err := Parse([]byte(in(snippet)))
		if p, ok := want[name]; err != nil || !ok || d.Policy == nil || *d.Policy != p {
			t.Errorf("%s: got %+v, %v", name, d.Policy, err)
		}
		delete(want, name)
	}
	if len(want) > 0 {
		t.Errorf("no snippets for %v", want)
	}
}

// validated says which of the documents xmllint finds to be of a schema.
func validated(t *testing.T, schema string, documents []string) []bool {
	t.Helper()
	xmllint, err := exec.LookPath("xmllint")
	if err != nil {
		const fix = "no xmllint: apt-get install libxml2-utils"
		if os.Getenv("CI") == "true" || os.Getenv("FTCLOCK_REQUIRE") == "1" {
			t.Fatal(fix)
		}
		t.Skip(fix)
	}
	dir := t.TempDir()
	// Copied, because go test repeats an old result unless it sees the test itself read the schemas.
	for _, name := range check.Value(filepath.Glob("*.rng"))(t) {
		check.NoError(t, os.WriteFile(filepath.Join(dir, name), read(t, name), 0o600))
	}
	args := []string{"--nonet", "--noout", "--relaxng", filepath.Join(dir, schema)}
	index := map[string]int{}
	for i, text := range documents {
		file := filepath.Join(dir, fmt.Sprintf("%04d.xml", i))
		check.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		args, index[file] = append(args, file), i
	}
	var stderr bytes.Buffer
	cmd := exec.Command(xmllint, args...)
	cmd.Stderr = &stderr
	_ = cmd.Run() // says only that some were refused
	accepted := make([]bool, len(documents))
	for line := range strings.Lines(stderr.String()) {
		if file, ok := strings.CutSuffix(line, " validates\n"); ok {
			accepted[index[file]] = true
		}
	}
	return accepted
}

// The schema and the parser are two descriptions of one language: xmllint and ParseElement must agree
// on every element.
func TestSchema(t *testing.T) {
	var elements []string
	for _, tt := range goodElements {
		elements = append(elements, tt.xml)
	}
	for _, tt := range badElements {
		elements = append(elements, tt.xml)
	}
	for _, snippet := range snippets(t) {
		elements = append(elements, snippet)
	}
	// Every order of every selection of events, and each of them twice.
	var sequences func(prefix []string)
	sequences = func(prefix []string) {
		elements = append(elements, clock(strings.Join(prefix, "\n")))
		for _, event := range eventNames {
			rule := "<ftclock:on event='" + event + "'/>"
			if !strings.Contains(strings.Join(prefix, ""), rule) {
				sequences(append(prefix[:len(prefix):len(prefix)], rule))
			} else {
				elements = append(elements, clock(strings.Join(append(prefix[:len(prefix):len(prefix)], rule), "\n")))
			}
		}
	}
	sequences(nil)
	for _, event := range append(eventNames[:], "resume") {
		for _, do := range []string{"", ` do="catch-up"`, ` do="hold"`, ` do="Hold"`, ` do=" hold"`} {
			for _, limit := range []string{"", ` limit="5s"`, ` limit="5"`} {
				elements = append(elements, on(`event="`+event+`"`+do+limit), on(limit+do+` event="`+event+`"`))
			}
		}
	}
	// Limits around every border.
	for _, unit := range []string{"ms", "s", "m", "min", "h", ""} {
		for _, number := range []string{"0", "0.0", "0.000016", "0.000017", "0.00001", "0.00002", "0.000020", "0.000099", "0.0001", "0.00099", "0.000999",
			"0.0009999", "0.001", "0.001999", "0.0019999", "0.019999", "0.199999", "0.0000999", "0.000171", "0.0000171", "0.01", "0.1", "0.9", "0.999999", "0.9999999", "1", "1.0", "1.", ".1", "01", "1.5", "9", "10",
			"14", "14.999999", "15", "15.0", "15.000000", "15.0000000", "15.000001", "16", "60", "99", "99.5", "100", "899.999999", "900",
			"900.0", "900.1", "901", "999", "1000", "9999", "89999", "99999.999999", "100000", "899999.999999", "900000", "900000.000",
			"900000.000001", "900001", "999999", "1000000", "9223372036854775808", "-1", "+1", "1e3", "1 ", " 1", "1,5", "٣"} {
			elements = append(elements, on(`event="checkpoint" limit="`+number+unit+`"`))
		}
	}
	for _, slew := range []string{"", "ppm", "0ppm", "1ppm", "01ppm", "500ppm", "500", "500 ppm", " 500ppm", "500PPM", "1.5ppm", "99999ppm",
		"100000ppm", "100001ppm", "200000ppm", "1000000ppm", "99999999999999999999ppm", "+1ppm", "-1ppm", "1e2ppm"} {
		elements = append(elements, `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="`+slew+`"/>`,
			`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="`+slew+`" reference="utc"/>`)
	}

	for _, monitor := range []string{"", "relayed", "direct", "Direct", " direct", "relay", "none"} {
		elements = append(elements, `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" monitor="`+monitor+`"/>`,
			`<ftclock:clock required="no" xmlns:ftclock="urn:ftclock:domain:1" monitor="`+monitor+`" reference="utc"/>`)
	}

	accepted := validated(t, "ftclock.rng", elements)
	good := 0
	for i, e := range elements {
		_, err := ParseElement([]byte(e))
		if (err == nil) != accepted[i] {
			t.Errorf("xmllint accepts: %v, the parser says: %v\n%s", accepted[i], err, e)
		}
		if err == nil {
			good++
		}
	}
	if good < 100 || len(elements)-good < 100 {
		t.Errorf("%d of %d elements are good: too few of one kind", good, len(elements))
	}
}
