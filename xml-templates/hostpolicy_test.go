package metadata

import (
	"fmt"
	"strings"
	"testing"

	"ftclock/test/check"
)

// policyFile is a file of a host's policy with this content, which starts on its second line.
func policyFile(content string) string {
	return "<policy xmlns=\"urn:ftclock:policy:1\">\n" + content + "\n</policy>\n"
}

const clockOfPolicy = `<clock xmlns="urn:ftclock:domain:1"/>`

func TestHostPolicy(t *testing.T) {
	got := check.Value(ParseHostPolicy([]byte(policyFile(`
<for name="web-*"/>
<for uuid="6695EB01F6A4830479AA97F2502E193F"/>
<for namespace="urn:other" element="flavor" attribute="name" value="gold"/>
<for namespace="urn:other" element="custom" value="on"/>
<c:clock xmlns:c="urn:ftclock:domain:1" required="no"><c:on event="suspend" do="catch-up"/></c:clock>`))))(t)
	want := []Selector{
		{Name: "web-*"}, {UUID: "6695eb01-f6a4-8304-79aa-97f2502e193f"},
		{Namespace: "urn:other", Element: "flavor", Attribute: "name", Value: "gold"},
		{Namespace: "urn:other", Element: "custom", Value: "on"},
	}
	if fmt.Sprint(got.For) != fmt.Sprint(want) {
		t.Errorf("for %v, want %v", got.For, want)
	}
	if p := policy(func(p *Policy) { p.Required, p.Suspend = false, Rule{CatchUp, 0} }); got.Policy != p {
		t.Errorf("policy %+v", got.Policy)
	}
}

// wrongPolicies are files that are refused, and what the parser says.
func wrongPolicies() []struct{ name, xml, want string } {
	return []struct{ name, xml, want string }{
		{"empty", "", "XML: empty; allowed: one XML document"},
		{"a domain", "<domain/>", `/domain (line 1): not a host's policy; allowed: <policy xmlns="urn:ftclock:policy:1">`},
		{"no namespace", "<policy/>", `/policy (line 1): not a host's policy; allowed: <policy xmlns="urn:ftclock:policy:1">`},
		{"nobody", policyFile(clockOfPolicy), `/policy: no domains; allowed: one or more elements "for"`},
		{"no clock", policyFile(`<for name="a"/>`), "/policy: no clock element; allowed: " + clockTag},
		{"two clocks", policyFile(`<for name="a"/>` + clockOfPolicy + clockOfPolicy), "/policy/clock[2] (line 2): a second clock element; allowed: one"},
		{"an attribute", `<policy xmlns="urn:ftclock:policy:1" mode="x"/>`, "/policy/@mode (line 1): unknown attribute; allowed: none"},
		{"text", policyFile("web"), `/policy (line 1): text "web"; allowed: no text`},
		{"two ways", policyFile(`<for name="a" uuid="6695eb01-f6a4-8304-79aa-97f2502e193f"/>`), "/policy/for[1] (line 2): it doesn't name domains in one way; allowed: name=, "},
		{"no way", policyFile(`<for/>`), "/policy/for[1] (line 2): it doesn't name domains in one way"},
		{"half an element", policyFile(`<for namespace="urn:other" element="flavor"/>`), "/policy/for[1] (line 2): it doesn't name domains in one way"},
		{"an unknown attribute", policyFile(`<for title="a"/>`), "/policy/for[1]/@title (line 2): unknown attribute; allowed: name=, "},
		{"an empty name", policyFile(`<for name=""/>`), "/policy/for[1]/@name (line 2): empty; allowed: a value"},
		{"a broken pattern", policyFile(`<for name="a"/>` + "\n" + `<for name="[a"/>`), `/policy/for[2]/@name (line 3): a broken pattern "[a"`},
		{"no UUID", policyFile(`<for uuid="web"/>`), `/policy/for[1]/@uuid (line 2): no UUID "web"`},
		{"a wrong clock", policyFile(`<for name="a"/><clock xmlns="urn:ftclock:domain:1" mode="x"/>`), "/policy/clock/@mode (line 2): unknown attribute; allowed: reference, slew, monitor, required"},
		{"an unknown element", policyFile(`<domain/>`), `/policy/domain (line 2): unknown element; allowed: elements "for"`},
		{"too many", policyFile(strings.Repeat(`<for name="a"/>`, 101)), "/policy/for[101] (line 2): too many; allowed: 100 of them"},
		{"cut off", "<policy xmlns='urn:ftclock:policy:1'><for name='a'/>", "/policy (line 1): ends before </policy>"},
	}
}

func TestHostPolicyThatIsWrong(t *testing.T) {
	for _, c := range wrongPolicies() {
		_, err := ParseHostPolicy([]byte(c.xml))
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
}

// Whom a file with a wrong clock names is known, wherever the clock stands in it.
func TestWhomAWrongHostPolicyNames(t *testing.T) {
	const wrong = `<clock xmlns="urn:ftclock:domain:1"><on event="x"/></clock>`
	for _, content := range []string{`<for name="a"/>` + wrong, wrong + `<for name="a"/>`} {
		got, err := ParseHostPolicy([]byte(policyFile(content)))
		if err == nil || !strings.Contains(err.Error(), `unknown value "x"`) || len(got.For) != 1 || got.For[0].Name != "a" {
			t.Errorf("%s: %+v, %v", content, got.For, err)
		}
	}
}

// A domain as OpenStack's Nova writes one: its flavor is what its owner chose.
const novaDomain = `<domain type="kvm" id="7">
  <name>instance-0000002a</name>
  <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:flavor name="ha.large"><nova:memory>512</nova:memory></nova:flavor>
      <nova:owner><nova:project uuid="77">demo &amp; co</nova:project></nova:owner>
    </nova:instance>
  </metadata>
  <devices><disk><nova:flavor xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1" name="elsewhere"/></disk></devices>
</domain>`

func TestSelectors(t *testing.T) {
	d := check.Value(Parse([]byte(novaDomain)))(t)
	subject := check.Value(ReadSubject(d.Name, d.UUID, []byte(novaDomain)))(t)
	const nova = "http://openstack.org/xmlns/libvirt/nova/1.1"
	for _, c := range []struct {
		selector Selector
		want     bool
	}{
		{Selector{Name: "instance-*"}, true},
		{Selector{Name: "instance-0000002a"}, true},
		{Selector{Name: "instance"}, false},
		{Selector{Name: "INSTANCE-*"}, false},
		{Selector{UUID: "6695eb01-f6a4-8304-79aa-97f2502e193f"}, true},
		{Selector{UUID: "6695eb01-f6a4-8304-79aa-97f2502e1930"}, false},
		{Selector{Namespace: nova, Element: "flavor", Attribute: "name", Value: "ha.*"}, true},
		{Selector{Namespace: nova, Element: "flavor", Attribute: "name", Value: "m1.*"}, false},
		{Selector{Namespace: nova, Element: "flavor", Attribute: "name", Value: "elsewhere"}, false}, // not in the metadata
		{Selector{Namespace: nova, Element: "flavor", Attribute: "id", Value: "*"}, false},
		{Selector{Namespace: "urn:other", Element: "flavor", Attribute: "name", Value: "ha.*"}, false},
		{Selector{Namespace: nova, Element: "memory", Value: "512"}, true},
		{Selector{Namespace: nova, Element: "memory", Value: "5"}, false},
		{Selector{Namespace: nova, Element: "project", Value: "demo & co"}, true},
		{Selector{}, false},
	} {
		if got := c.selector.Matches(subject); got != c.want {
			t.Errorf("%+v: %v", c.selector, got)
		}
	}
	for _, xml := range []string{"", "<network/>", "<domain>"} {
		if _, err := ReadSubject("", "", []byte(xml)); err == nil {
			t.Errorf("%q is a domain", xml)
		}
	}
}

// Whatever the two are, reading them ends, and an error is one line.
func FuzzHostPolicy(f *testing.F) {
	f.Add([]byte(policyFile(`<for name="web-*"/>`+clockOfPolicy)), []byte(novaDomain))
	f.Add([]byte(policyFile(`<for namespace="a" element="b" value="*"/>`)), []byte("<domain><metadata><b xmlns='a'>x<c/>y</b></metadata></domain>"))
	f.Fuzz(func(t *testing.T, file, domain []byte) {
		p, err := ParseHostPolicy(file)
		if err != nil && strings.ContainsAny(err.Error(), "\n\x00\x1b") {
			t.Errorf("more than a line: %q", err)
		}
		if err == nil && len(p.For) == 0 {
			t.Error("a policy for nobody")
		}
		d, err := ReadSubject("web", "", domain)
		if err != nil {
			return
		}
		for _, s := range p.For {
			s.Matches(d)
		}
	})
}
