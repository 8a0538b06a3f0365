package metadata

import (
	"math"
	"strings"
	"testing"

	"ftclock/test/check"
)

var someAnchor = Anchor{
	Clock: 77_000_000_000, Real: 1_700_000_000_000_000_000, Raw: 88_000_000_000, Boot: "0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9",
	Slept: 5, Rate: -12345, Error: 150, HostError: 2000, Synchronised: true,
}

// inDomain puts an element, as virDomainSetMetadata stores it, into a domain.
func inDomain(anchor string) []byte {
	anchor = strings.Replace(anchor, "<anchor", "<"+AnchorPrefix+":anchor xmlns:"+AnchorPrefix+`="`+AnchorNamespace+`"`, 1)
	return []byte(`<domain type='kvm'><name>n</name><metadata>` + Default().XML() + anchor + `</metadata></domain>`)
}

func TestAnchorIsReadAsWritten(t *testing.T) {
	for _, want := range []Anchor{
		someAnchor,
		{Real: 1},
		{Clock: maxClock, Real: maxClock, Raw: maxClock, Boot: `"<&>'`, Slept: maxClock, Rate: maxRate, Error: maxClock, HostError: maxClock},
	} {
		d := check.Value(Parse(inDomain(want.XML())))(t)
		if d.AnchorErr != nil || d.Anchor == nil || *d.Anchor != want {
			t.Errorf("%s: read %+v, %v", want.XML(), d.Anchor, d.AnchorErr)
		}
		if d.Policy == nil {
			t.Error("the policy beside it is gone")
		}
		if a, err := ParseAnchor([]byte(want.XML())); err != nil || a != want {
			t.Errorf("%s alone: read %+v, %v", want.XML(), a, err)
		}
	}
}

// What can't be used is said, and keeps no domain from starting.
func TestAnchorThatCantBeUsed(t *testing.T) {
	with := func(change func(*Anchor)) string {
		a := someAnchor
		change(&a)
		return a.XML()
	}
	for name, xml := range map[string]string{
		"nothing":         `<anchor/>`,
		"no number":       strings.Replace(someAnchor.XML(), "77000000000", "soon", 1),
		"an attribute":    strings.Replace(someAnchor.XML(), "raw=", "war=", 1),
		"negative":        strings.Replace(someAnchor.XML(), "77000000000", "-1", 1),
		"too large":       strings.Replace(someAnchor.XML(), "77000000000", "99999999999999999999", 1),
		"clock":           with(func(a *Anchor) { a.Clock = math.MaxUint64 }),
		"no time":         with(func(a *Anchor) { a.Real = 0 }),
		"time":            with(func(a *Anchor) { a.Real = maxClock + 1 }),
		"raw":             with(func(a *Anchor) { a.Raw = maxClock + 1 }),
		"slept":           with(func(a *Anchor) { a.Slept = maxClock + 1 }),
		"error":           with(func(a *Anchor) { a.Error = maxClock + 1 }),
		"the host's":      with(func(a *Anchor) { a.HostError = maxClock + 1 }),
		"rate":            with(func(a *Anchor) { a.Rate = maxRate + 1 }),
		"rate, down":      with(func(a *Anchor) { a.Rate = -maxRate - 1 }),
		"a boot too long": with(func(a *Anchor) { a.Boot = strings.Repeat("x", 65) }),
	} {
		if a, err := ParseAnchor([]byte(xml)); err == nil {
			t.Errorf("%s alone: read as %+v", name, a)
		}
		d, err := Parse(inDomain(xml))
		if err != nil || d.Policy == nil {
			t.Errorf("%s: the domain doesn't start: %v", name, err)
		}
		if d.Anchor != nil || d.AnchorErr == nil || strings.Contains(d.AnchorErr.Error(), "\n") {
			t.Errorf("%s: %+v, %v", name, d.Anchor, d.AnchorErr)
		}
	}
	for _, xml := range []string{"", "<clock/>", someAnchor.XML() + "<x/>", "<x>" + someAnchor.XML() + "</x>", "<anchor"} {
		if a, err := ParseAnchor([]byte(xml)); err == nil {
			t.Errorf("%q: read as %+v", xml, a)
		}
	}
	// Elsewhere in a domain it is nothing.
	d, err := Parse([]byte(`<domain type='kvm'><devices><a:anchor xmlns:a="` + AnchorNamespace + `"/></devices></domain>`))
	if err != nil || d.Anchor != nil || d.AnchorErr != nil {
		t.Errorf("in another place: %+v, %v", d, err)
	}
}

// The editor leaves an anchor where it is.
func TestAnchorSurvivesTheEditor(t *testing.T) {
	xml := check.Value(Enable(inDomain(someAnchor.XML()), EditOptions{Policy: Default()}))(t)
	xml = check.Value(Disable(xml))(t)
	if d, err := Parse(xml); err != nil || d.Anchor == nil || *d.Anchor != someAnchor || d.Policy != nil {
		t.Errorf("%+v, %v in\n%s", d, err, xml)
	}
}
