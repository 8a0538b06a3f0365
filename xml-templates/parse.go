package metadata

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// Module is the file name of the library inside QEMU: an LD_PRELOAD entry with this base name is ours.
const Module = "libftclock-qemu.so"

const qemuNamespace = "http://libvirt.org/schemas/domain/qemu/1.0"

// family starts the namespaces of all versions of our language.
const family = "urn:ftclock:"

const clockTag = "<" + Prefix + ":clock xmlns:" + Prefix + `="` + Namespace + `">`

const preloadVariable = "LD_PRELOAD"

// Domain is what ftclock reads of a domain's XML.
type Domain struct {
	// ID is the running domain's, -1 when it has none.
	ID int
	// Name, UUID and Type are as written, and empty when absent: libvirt always has them.
	Name, UUID, Type string
	// Policy is nil when the domain isn't managed by ftclock.
	Policy *Policy
	// Anchor is what came with the domain from where it ran before; nil where nothing did. AnchorErr says why what came
	// can't be used.
	Anchor    *Anchor
	AnchorErr error
	// Preload: LD_PRELOAD, set through qemu:env, names Module.
	Preload bool
}

// Managed tells cheaply whether xml may hold a clock element. It errs on the side of true (a comment
// may quote the namespace; another version of our namespace must be refused, not ignored): Parse
// decides. It looks for the text that libvirt writes, which has no character references in it.
func Managed(xml []byte) bool { return bytes.Contains(xml, []byte(family)) }

// Parse reads a domain's XML. Every error is an *Error.
func Parse(xml []byte) (Domain, error) {
	d, err := readDocument(xml)
	if err != nil {
		return Domain{}, err
	}
	return d.domain, nil
}

// ParseElement reads a clock element that stands alone. It may have lost its namespace, as in the
// output of `virsh metadata`. Every error is an *Error.
func ParseElement(xml []byte) (Policy, error) {
	r := &elementReader{}
	if err := scan(xml, r); err != nil {
		return Policy{}, err
	}
	return r.policy, nil
}

// readDocument reads a domain for Parse and for the editor.
func readDocument(xml []byte) (*document, error) {
	d, err := readEditable(xml)
	if d != nil && d.clockErr != nil {
		return nil, d.clockErr // it stands before err
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// readEditable bears a clock element whose content is wrong, which the editor can replace or remove.
// The document comes with an error, too: it then holds what was read so far.
func readEditable(xml []byte) (*document, error) {
	d := &document{data: xml, domain: Domain{ID: -1}}
	return d, scan(xml, d)
}

// clockReader reads one clock element.
type clockReader struct {
	policy Policy
	// ns is the clock element's: Namespace, or nothing when libvirt stripped it.
	ns string
	// depth counts the open elements, from the clock element on.
	depth int
	ons   int
	seen  map[string]bool
}

func (c *clockReader) open(s *scanner, e *element) error {
	c.depth++
	switch c.depth {
	case 1:
		c.policy, c.ns, c.seen = Default(), e.ns, make(map[string]bool)
		return c.openClock(s, e)
	case 2:
		if e.ns == c.ns && e.local == "on" {
			c.ons++
			e.index = c.ons
			return c.openOn(s, e)
		}
		return s.fail(e.start, "", "unknown element", `elements "on" of namespace `+Namespace)
	}
	return s.fail(e.start, "", "unknown element", "an empty element "+quote(s.stack[len(s.stack)-2].name()))
}

func (c *clockReader) openClock(s *scanner, e *element) error {
	for i := range e.attrs {
		a := &e.attrs[i]
		var err error
		switch {
		case a.isNamespace():
		case a.name() == "reference":
			c.policy.Reference, err = choice[Reference](s, a, references)
		case a.name() == "slew":
			slew, reason := parseSlew(a.value)
			if reason != "" {
				return s.fail(a.start, "/@slew", reason, slewAllowed)
			}
			if c.policy.Slew = slew; slew == DefaultSlew {
				c.policy.Slew = 0
			}
		case a.name() == "monitor":
			c.policy.Monitor, err = choice[Monitor](s, a, monitors)
		case a.name() == "required":
			var no uint8
			no, err = choice[uint8](s, a, []string{"yes", "no"})
			c.policy.Required = no == 0
		default:
			err = unknownAttr(s, a, "reference, slew, monitor, required")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// choice is the value that an attribute gives, one of these words.
func choice[T ~uint8](s *scanner, a *attr, words []string) (T, error) {
	i := slices.Index(words, a.value)
	if i < 0 {
		return 0, unknownValue(s, a, strings.Join(words, ", "))
	}
	return T(i), nil
}

func (c *clockReader) openOn(s *scanner, e *element) error {
	for i := range e.attrs {
		a := &e.attrs[i]
		switch {
		case a.isNamespace():
		case a.name() == "event", a.name() == "do", a.name() == "limit":
		default:
			return unknownAttr(s, a, "event, do, limit")
		}
	}
	events := strings.Join(eventNames[:], ", ")
	a := e.attr("event")
	if a == nil {
		return s.fail(e.start, "", "no event", "event= one of "+events)
	}
	event := a.value
	r := c.policy.rule(event)
	switch {
	case r == nil:
		return unknownValue(s, a, events)
	case c.seen[event]:
		return s.fail(a.start, "/@event", "a second rule for "+event, "one for each event")
	}
	c.seen[event] = true
	if a := e.attr("do"); a != nil {
		var err error
		if r.Do, err = choice[Action](s, a, actions); err != nil {
			return err
		}
	}
	r.Limit = impliedLimit(event, r.Do)
	if a := e.attr("limit"); a != nil {
		if r.Do == Hold && event != "checkpoint" {
			return s.fail(a.start, "/@limit", "a limit, but "+event+" is held however long it is",
				`no limit, or do="catch-up"`)
		}
		limit, reason := parseLimit(a.value)
		if reason != "" {
			return s.fail(a.start, "/@limit", reason, limitAllowed)
		}
		r.Limit = limit
	}
	return nil
}

func (c *clockReader) text(s *scanner, _ *element, text []byte, at int) error {
	if len(trimSpace(text)) == 0 {
		return nil
	}
	at += len(s.data[at:]) - len(bytes.TrimLeft(s.data[at:], " \t\r\n"))
	return s.fail(at, "", "text "+quote(string(trimSpace(text))), "no text")
}

func (c *clockReader) close(*scanner, *element) error {
	c.depth--
	return nil
}

func unknownAttr(s *scanner, a *attr, allowed string) error {
	return s.fail(a.start, "/@"+shorten(a.name()), "unknown attribute", allowed)
}

func unknownValue(s *scanner, a *attr, allowed string) error {
	return s.fail(a.start, "/@"+shorten(a.name()), "unknown value "+quote(a.value), allowed)
}

// elementReader is a clockReader whose root must be a clock element.
type elementReader struct{ clockReader }

func (r *elementReader) open(s *scanner, e *element) error {
	if len(s.stack) == 1 && (e.local != "clock" || e.ns != Namespace && e.ns != "") {
		return s.fail(e.start, "", "not a clock element of ftclock", clockTag)
	}
	return r.clockReader.open(s, e)
}

// document is a domain's XML with the places that the editor works on.
type document struct {
	data   []byte
	domain Domain

	root *element
	// header is the last of the children of <domain> that libvirt puts before <metadata>.
	header                *element
	metadata, commandline *element
	// clock is our element. clockErr is what is wrong inside it.
	clock    *element
	clockErr error
	preloads []preload
	// prefixUses counts the names that are written with a prefix, for the one prefix that the
	// editor may have declared.
	prefixUses int

	reader *clockReader // while a clock element is open
	field  *string      // the text being collected
}

// preload is a qemu:env of LD_PRELOAD. libvirt lets the last one win.
type preload struct{ env, commandline *element }

func (p preload) value() string {
	if a := p.env.attr("value"); a != nil {
		return a.value
	}
	return ""
}

func (d *document) open(s *scanner, e *element) error {
	d.countPrefix(e)
	if d.reader != nil {
		d.readClock(d.reader.open, s, e)
		return nil
	}
	depth := len(s.stack)
	var parent *element
	if depth > 1 {
		parent = s.stack[depth-2]
	}
	d.field = nil
	inMetadata := depth == 3 && parent == d.metadata
	switch {
	case e.ns == AnchorNamespace && inMetadata:
		d.readAnchor(e)
		return nil
	case e.ns == AnchorNamespace:
		return nil
	case e.ns == Namespace && !inMetadata:
		return s.fail(e.start, "", "an element of "+Namespace+" in a wrong place", "a child of /domain/metadata")
	case e.ns == Namespace && e.local != "clock":
		return s.fail(e.start, "", "unknown element", "element "+quote(join(e.prefix, "clock")))
	case e.ns == Namespace && d.clock != nil:
		e.index = 2
		return s.fail(e.start, "", "a second clock element", "one")
	case e.ns == Namespace:
		d.clock = e
		d.reader = &clockReader{}
		d.readClock(d.reader.open, s, e)
		return nil
	case strings.HasPrefix(strings.ToLower(e.ns)+":", family), inMetadata && e.prefix == Prefix:
		return s.fail(e.start, "", "unknown namespace "+quote(e.ns), Namespace)
	case inMetadata && e.ns == "" && e.local == "clock":
		return s.fail(e.start, "", "a clock element without a namespace", clockTag)
	case depth == 1:
		return d.openRoot(s, e)
	case depth == 2:
		return d.openChild(s, e)
	case depth == 3 && parent.ns == qemuNamespace && parent.local == "commandline":
		if a := e.attr("name"); e.ns == qemuNamespace && e.local == "env" && a != nil && a.value == preloadVariable {
			d.preloads = append(d.preloads, preload{e, parent})
		}
	}
	return nil
}

func (d *document) openRoot(s *scanner, e *element) error {
	if e.local != "domain" || e.ns != "" {
		return s.fail(e.start, "", "not a domain", "<domain> without a namespace")
	}
	d.root = e
	if a := e.attr("type"); a != nil {
		d.domain.Type = a.value
	}
	if a := e.attr("id"); a != nil {
		id, err := strconv.ParseInt(a.value, 10, 32)
		if err != nil || id < 0 {
			return s.fail(a.start, "/@id", "not an id: "+quote(a.value), "a whole number, 0 or more")
		}
		d.domain.ID = int(id)
	}
	return nil
}

func (d *document) openChild(s *scanner, e *element) error {
	switch {
	case e.ns == qemuNamespace && e.local == "commandline" && d.commandline == nil:
		d.commandline = e
	case e.ns != "":
	case e.local == "metadata" && d.metadata != nil:
		e.index = 2
		return s.fail(e.start, "", "a second metadata element", "one: libvirt drops the others")
	case e.local == "metadata":
		d.metadata = e
	case e.local == "name" && d.domain.Name == "":
		d.header, d.field = e, &d.domain.Name
	case e.local == "uuid" && d.domain.UUID == "":
		d.header, d.field = e, &d.domain.UUID
	case e.local == "hwuuid", e.local == "genid", e.local == "title", e.local == "description":
		d.header = e
	}
	return nil
}

func (d *document) text(s *scanner, e *element, text []byte, at int) error {
	switch {
	case d.reader != nil:
		d.readClock(func(s *scanner, e *element) error { return d.reader.text(s, e, text, at) }, s, e)
	case d.field != nil:
		*d.field += string(text)
	}
	return nil
}

func (d *document) close(s *scanner, e *element) error {
	if d.reader != nil {
		d.readClock(d.reader.close, s, e)
	}
	d.field = nil
	switch {
	case e == d.clock:
		if d.clockErr == nil {
			d.domain.Policy = &d.reader.policy
		}
		d.reader = nil
	case e == d.root:
		if n := len(d.preloads); n > 0 {
			d.domain.Preload = namesModule(d.preloads[n-1].value())
		}
	}
	return nil
}

// readClock keeps the first error: after it the clock's content is only walked through.
func (d *document) readClock(read func(*scanner, *element) error, s *scanner, e *element) {
	if d.clockErr == nil {
		d.clockErr = read(s, e)
	}
}

func (d *document) readAnchor(e *element) {
	a, err := readAnchor(e)
	if d.domain.AnchorErr = err; err == nil {
		d.domain.Anchor = &a
	}
}

func (d *document) countPrefix(e *element) {
	if e.prefix == qemuPrefix {
		d.prefixUses++
	}
	for i := range e.attrs {
		if e.attrs[i].prefix == qemuPrefix {
			d.prefixUses++
		}
	}
}
