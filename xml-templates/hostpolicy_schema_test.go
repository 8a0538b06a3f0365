package metadata

import (
	"encoding/xml"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// pagePolicies are the files of a host's policy that the pages show.
func pagePolicies(t *testing.T) (all []string) {
	t.Helper()
	for _, page := range []string{"../docs/policy.md", "../docs/orchestrators.md"} {
		shown := regexp.MustCompile("(?s)\n *```xml\n *(<policy .*?)```\n").FindAllSubmatch(read(t, page), -1)
		if len(shown) == 0 {
			t.Fatalf("%s shows no file", page)
		}
		for _, found := range shown {
			all = append(all, string(found[1]))
		}
	}
	return all
}

// attribute writes one, whatever its value.
func attribute(name, value string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(value))
	return fmt.Sprintf(" %s=\"%s\"", name, b.String())
}

// selectors are elements "for", good and bad.
func selectors() (all []string) {
	add := func(attributes string) { all = append(all, "<for"+attributes+"/>") }
	// Each selection of the attributes, each with a value or empty.
	names := []string{"name", "uuid", "namespace", "element", "attribute", "value"}
	values := map[string]string{"name": "web-*", "uuid": "6695eb01-f6a4-8304-79aa-97f2502e193f", "namespace": "urn:other", "element": "flavor",
		"attribute": "name", "value": "ha.*"}
	for set := range 1 << len(names) {
		var full, empty string
		for i, name := range names {
			if set&(1<<i) != 0 {
				full += attribute(name, values[name])
				empty = attribute(name, "") + empty
			}
		}
		add(full)
		add(empty)
	}
	for _, pattern := range []string{"a", "*", "**", "?", "a*b?c", "]", "-", "^", "[a]", "[a", "[", "[]", "[]a]", "[^]", "[^a]", "[^^]", "[^]a]", "[a-]", "[-a]", "[a-c]",
		"[a-cx]", "[a-c-]", "[a-c-e]", "[c-a]", "[a-^]", "[^-]", "[^a-]", "[^a-b]", "[*]", "[?]", "[[]", "[[-b]", `\`, `\\`, `\a`, `a\`, `[\]]`, `[\-]`, `[\^]`, `[a\]`, `[\\]`, `[a-\]]`,
		`[\a-\c]`, "[a]b[c]", "[a][", "[a]]", "*[", "a[b]*[c-", " ", " a ", "ü[ä-ö]", "a/b", "a\tb", "a\nb", "\\\n", "[\\\n]", "[\n]", "<&\"'", "a[^b-c-d]", `[^\]]`, `[^\]`, "[^^-z]", "[^^-]", "x{2}", "x+(y)|."} {
		add(attribute("name", pattern))
		add(attribute("namespace", "urn:other") + attribute("element", "e") + attribute("value", pattern))
	}
	for _, id := range []string{"6695EB01F6A4830479AA97F2502E193F", "6695eb01-f6a4-8304-79aa-97f2502e193", "6695eb01-f6a4-8304-79aa-97f2502e193f0", "66-95eb01f6a4830479aa97f2502e193-f",
		"-6695eb01f6a4830479aa97f2502e193f--", "6695eb01 f6a4 8304 79aa 97f2502e193f", " 6695eb01f6a4830479aa97f2502e193f", "6695eb01f6a4830479aa97f2502e193g", "-", "web"} {
		add(attribute("uuid", id))
	}
	return append(all, `<for name="a">web</for>`, `<for name="a"> </for>`, `<for name="a"><for name="b"/></for>`, `<for name="a"><!-- why --></for>`,
		`<for xmlns:p="urn:p" p:name="a"/>`, `<for xmlns:p="urn:p" name="a"/>`, `<for xmlns="urn:other" name="a"/>`, `<For name="a"/>`, `<for Name="a"/>`)
}

// The schema and the parser agree on every file, but for how many domains one may name.
func TestHostPolicySchema(t *testing.T) {
	documents := pagePolicies(t)
	shown := len(documents)
	for _, c := range wrongPolicies() {
		if c.name != "too many" { // RELAX NG counts only by writing each of them down
			documents = append(documents, c.xml)
		}
	}
	for _, s := range selectors() {
		documents = append(documents, policyFile(s+clockOfPolicy))
	}
	for _, e := range goodElements {
		documents = append(documents, policyFile(`<for name="a"/>`+e.xml), policyFile(e.xml+`<for name="a"/>`))
	}
	for _, e := range badElements {
		documents = append(documents, policyFile(`<for name="a"/>`+e.xml))
	}
	const one = `<for name="a"/>`
	documents = append(documents, policyFile(one+clockOfPolicy+one), policyFile(strings.Repeat(one, 100)+clockOfPolicy), policyFile(one+"text"+clockOfPolicy),
		policyFile(one+"<clock/>"), policyFile(one+"<!-- a --><?b?>"+clockOfPolicy), policyFile(clockOfPolicy),
		`<p:policy xmlns:p="urn:ftclock:policy:1"><p:for name="a"/>`+clockOfPolicy+`</p:policy>`,
		`<p:policy xmlns:p="urn:ftclock:policy:1"><for name="a"/>`+clockOfPolicy+`</p:policy>`,
		`<policy xmlns="urn:ftclock:policy:2"><for name="a"/>`+clockOfPolicy+`</policy>`,
		`<policy xmlns="urn:ftclock:policy:1" xml:lang="en"><for name="a"/>`+clockOfPolicy+`</policy>`)
	good := 0
	for i, accepted := range validated(t, "ftclock-policy.rng", documents) {
		_, err := ParseHostPolicy([]byte(documents[i]))
		if (err == nil) != accepted {
			t.Errorf("xmllint accepts: %v, the parser says: %v\n%s", accepted, err, documents[i])
		}
		if i < shown && err != nil {
			t.Errorf("a page shows a file that is wrong: %v\n%s", err, documents[i])
		}
		if err == nil {
			good++
		}
	}
	if good < 60 || len(documents)-good < 100 {
		t.Errorf("%d of %d files are good: too few of one kind", good, len(documents))
	}
	t.Logf("%d files are good, %d bad", good, len(documents)-good)
}
