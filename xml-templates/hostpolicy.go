package metadata

import (
	"path"
	"slices"
	"strings"

	"ftclock/host"
)

// PolicyNamespace is that of the files of a host's policy.
const PolicyNamespace = "urn:ftclock:policy:1"

const policyTag = `<policy xmlns="` + PolicyNamespace + `">`

// maxSelectors bounds how many domains or groups of domains one file names.
const maxSelectors = 100

// HostPolicy is a file of a host's policy: a clock element, and for which domains it stands in for one in
// their own metadata.
type HostPolicy struct {
	Policy Policy
	For    []Selector
}

// Selector names domains by one of three: their name, their UUID, or an element of somebody else's in their
// metadata.
type Selector struct {
	// Name is a pattern of path.Match: * is any text, ? one character, [a-c] one of some.
	Name string
	// UUID is as libvirt writes it.
	UUID string
	// Namespace and Element are of an element anywhere below /domain/metadata. Value is a pattern for its
	// attribute of the name Attribute, in no namespace, or for its text where Attribute is empty.
	Namespace, Element, Attribute, Value string
}

// String words it for people.
func (s Selector) String() string {
	switch {
	case s.Name != "":
		return "name " + quote(s.Name)
	case s.UUID != "":
		return "UUID " + s.UUID
	case s.Attribute != "":
		return "element " + s.Element + " with " + s.Attribute + "=" + quote(s.Value)
	}
	return "element " + s.Element + " with the text " + quote(s.Value)
}

// ParseHostPolicy reads a file of a host's policy. Every error is an *Error. With an error comes what was read of it:
// the domains that it names, as far as they are known.
func ParseHostPolicy(xml []byte) (HostPolicy, error) {
	r := &policyReader{}
	err := scan(xml, r)
	if r.clockErr != nil {
		err = r.clockErr // it stands before any other
	}
	switch {
	case err != nil:
	case len(r.result.For) == 0:
		err = &Error{Path: "/policy", Reason: "no domains", Allowed: `one or more elements "for"`}
	case r.clock == nil:
		err = &Error{Path: "/policy", Reason: "no clock element", Allowed: clockTag}
	}
	return r.result, err
}

// policyReader reads one policy element.
type policyReader struct {
	result   HostPolicy
	clock    *element // once it was seen
	reader   *clockReader
	clockErr error // what is wrong inside it
}

func (r *policyReader) readClock(err error) {
	if r.clockErr == nil {
		r.clockErr = err
	}
}

func (r *policyReader) open(s *scanner, e *element) error {
	switch depth := len(s.stack); {
	case r.reader != nil:
		r.readClock(r.reader.open(s, e))
		return nil
	case depth == 1 && (e.ns != PolicyNamespace || e.local != "policy"):
		return s.fail(e.start, "", "not a host's policy", policyTag)
	case depth == 1:
		for i := range e.attrs {
			if a := &e.attrs[i]; !a.isNamespace() {
				return unknownAttr(s, a, "none")
			}
		}
		return nil
	case depth == 2 && e.ns == Namespace && e.local == "clock":
		if r.clock != nil {
			e.index = 2
			return s.fail(e.start, "", "a second clock element", "one")
		}
		r.clock, r.reader = e, &clockReader{}
		r.readClock(r.reader.open(s, e))
		return nil
	case depth == 2 && e.ns == PolicyNamespace && e.local == "for":
		e.index = len(r.result.For) + 1
		return r.openFor(s, e)
	}
	return s.fail(e.start, "", "unknown element", `elements "for" of namespace `+PolicyNamespace+" and "+clockTag)
}

func (r *policyReader) openFor(s *scanner, e *element) error {
	var sel Selector
	fields := map[string]*string{"name": &sel.Name, "uuid": &sel.UUID, "namespace": &sel.Namespace, "element": &sel.Element,
		"attribute": &sel.Attribute, "value": &sel.Value}
	const either = "name=, or uuid=, or namespace=, element=, value= and, for an attribute's value, attribute="
	for i := range e.attrs {
		a := &e.attrs[i]
		switch field := fields[a.name()]; {
		case a.isNamespace():
		case field == nil:
			return unknownAttr(s, a, either)
		case a.value == "":
			return s.fail(a.start, "/@"+a.name(), "empty", "a value")
		default:
			*field = a.value
		}
	}
	foreign := sel.Namespace != "" && sel.Element != "" && sel.Value != ""
	any := sel.Namespace+sel.Element+sel.Attribute+sel.Value != ""
	switch kinds := count(sel.Name != "", sel.UUID != "", any); {
	case kinds != 1 || any && !foreign:
		return s.fail(e.start, "", "it doesn't name domains in one way", either)
	case len(r.result.For) == maxSelectors:
		return s.fail(e.start, "", "too many", "100 of them; patterns name many domains")
	}
	for _, a := range []string{"name", "value"} {
		if _, err := path.Match(*fields[a], ""); err != nil {
			return s.fail(e.start, "/@"+a, "a broken pattern "+quote(*fields[a]), `a pattern such as "web-*", "node?" or "[ab]*"`)
		}
	}
	if sel.UUID != "" {
		id, ok := host.UUID(sel.UUID)
		if !ok {
			return s.fail(e.start, "/@uuid", "no UUID "+quote(sel.UUID), "a UUID, such as `virsh domuuid` prints")
		}
		sel.UUID = id
	}
	r.result.For = append(r.result.For, sel)
	return nil
}

func count(all ...bool) (n int) {
	for _, is := range all {
		if is {
			n++
		}
	}
	return n
}

func (r *policyReader) text(s *scanner, e *element, text []byte, at int) error {
	switch {
	case r.reader != nil:
		r.readClock(r.reader.text(s, e, text, at))
	case len(trimSpace(text)) > 0:
		return s.fail(at, "", "text "+quote(string(trimSpace(text))), "no text")
	}
	return nil
}

func (r *policyReader) close(s *scanner, e *element) error {
	if r.reader != nil {
		r.readClock(r.reader.close(s, e))
	}
	if e == r.clock {
		r.result.Policy, r.reader = r.reader.policy, nil
	}
	return nil
}

// Subject is a domain as selectors see it.
type Subject struct {
	name, uuid string
	foreign    []foreignElement
}

// foreignElement is an element below /domain/metadata.
type foreignElement struct {
	ns, local string
	attrs     []attr
	text      string
}

// NamedSubject is a domain of which only its name and UUID are known; "" is none. No element is in its metadata.
func NamedSubject(name, uuid string) *Subject { return &Subject{name: name, uuid: uuid} }

// ReadSubject reads for selectors what is in the XML of a domain, whose name and UUID are known. Every error is an *Error.
func ReadSubject(name, uuid string, xml []byte) (*Subject, error) {
	r := &subjectReader{subject: Subject{name: name, uuid: uuid}}
	if err := scan(xml, r); err != nil {
		return nil, err
	}
	return &r.subject, nil
}

// Matches says whether the selector names the domain.
func (s Selector) Matches(d *Subject) bool {
	match := func(pattern, text string) bool {
		ok, err := path.Match(pattern, text)
		return ok && err == nil
	}
	switch {
	case s.Name != "":
		return match(s.Name, d.name)
	case s.UUID != "":
		return s.UUID == d.uuid
	}
	return slices.ContainsFunc(d.foreign, func(e foreignElement) bool {
		if e.ns != s.Namespace || e.local != s.Element {
			return false
		}
		if s.Attribute == "" {
			return match(s.Value, strings.TrimSpace(e.text))
		}
		return slices.ContainsFunc(e.attrs, func(a attr) bool {
			return a.prefix == "" && a.local == s.Attribute && match(s.Value, a.value)
		})
	})
}

// subjectReader reads a domain's metadata.
type subjectReader struct {
	subject Subject
	opened  []int // the foreign elements that are open
}

func (r *subjectReader) open(s *scanner, e *element) error {
	switch depth := len(s.stack); {
	case depth == 1 && (e.local != "domain" || e.ns != ""):
		return s.fail(e.start, "", "not a domain", "<domain> without a namespace")
	case depth > 2 && s.stack[1].local == "metadata" && s.stack[1].ns == "":
		r.opened = append(r.opened, len(r.subject.foreign))
		r.subject.foreign = append(r.subject.foreign, foreignElement{ns: e.ns, local: e.local, attrs: e.attrs})
	}
	return nil
}

func (r *subjectReader) text(_ *scanner, _ *element, text []byte, _ int) error {
	if len(r.opened) > 0 {
		r.subject.foreign[r.opened[len(r.opened)-1]].text += string(text)
	}
	return nil
}

func (r *subjectReader) close(*scanner, *element) error {
	if len(r.opened) > 0 {
		r.opened = r.opened[:len(r.opened)-1]
	}
	return nil
}
