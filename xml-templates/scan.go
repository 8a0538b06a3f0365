package metadata

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxSize  = 16 << 20
	maxDepth = 256
)

const (
	xmlNamespace   = "http://www.w3.org/XML/1998/namespace"
	xmlnsNamespace = "http://www.w3.org/2000/xmlns/"
)

const wellFormed = "well-formed XML, such as libvirt writes"

// attr is an attribute with its place in the document: data[start:end] is name="value" and
// data[valueStart:valueEnd] is the value as written, without its quotes.
type attr struct {
	prefix, local, ns, value         string
	start, valueStart, valueEnd, end int
}

func (a *attr) name() string { return join(a.prefix, a.local) }

// isNamespace tells a namespace declaration from an attribute.
func (a *attr) isNamespace() bool {
	return a.prefix == "xmlns" || a.prefix == "" && a.local == "xmlns"
}

// element is an element with its place in the document: data[start:tagEnd] is its start tag and
// data[closeStart:end] its end tag. An empty-element tag has tagEnd == closeStart == end.
type element struct {
	prefix, local, ns              string
	attrs                          []attr
	start, tagEnd, closeStart, end int
	// firstChild is where the first child element starts, 0 when there is none.
	firstChild int
	// index is shown in paths, where it tells siblings apart. 0: not shown.
	index int
}

func (e *element) name() string { return join(e.prefix, e.local) }

// attr returns the attribute of that name in no namespace, or nil.
func (e *element) attr(local string) *attr {
	for i := range e.attrs {
		if a := &e.attrs[i]; a.prefix == "" && a.local == local {
			return a
		}
	}
	return nil
}

func join(prefix, local string) string {
	if prefix == "" {
		return local
	}
	return prefix + ":" + local
}

// handler is told what the scanner finds. The scanner's stack ends with the element concerned.
type handler interface {
	open(s *scanner, e *element) error
	// text gets character data, entities resolved. at is where it starts.
	text(s *scanner, e *element, text []byte, at int) error
	close(s *scanner, e *element) error
}

// scanner walks a document once. It takes the tokens from encoding/xml and adds what that leaves out:
// well-formedness as a whole (RawToken checks single tokens), namespaces, and byte offsets.
// A document type is refused, so that there are no entities to expand but XML's own five.
type scanner struct {
	data  []byte
	stack []*element
	// bound maps a prefix to its namespaces, innermost last. A map, because a hostile document may
	// declare very many.
	bound map[string][]string
}

var errCharset = errors.New("encoding other than UTF-8")

// scan reads the whole document. Every error is an *Error.
func scan(data []byte, h handler) error {
	s := &scanner{data: data, bound: map[string][]string{"": {""}, "xml": {xmlNamespace}}}
	if err := s.checkBytes(); err != nil {
		return err
	}
	dec := xml.NewDecoder(bytes.NewReader(data))
	dec.Strict = true
	dec.CharsetReader = func(string, io.Reader) (io.Reader, error) { return nil, errCharset }
	rootSeen := false
	for {
		start := int(dec.InputOffset())
		tok, err := dec.RawToken()
		end := int(dec.InputOffset())
		if err == io.EOF {
			break
		}
		if err != nil {
			return s.broken(end, err)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			if len(s.stack) == 0 && rootSeen {
				return s.fail(start, "", "a second root element", "one root element")
			}
			rootSeen = true
			err = s.push(tok, start, end, h)
		case xml.EndElement:
			err = s.pop(tok, start, end, h)
		case xml.CharData:
			switch {
			case len(s.stack) > 0:
				err = h.text(s, s.stack[len(s.stack)-1], tok, start)
			case len(trimSpace(data[start:end])) > 0:
				err = s.fail(skipSpace(data, start), "", "text outside the root element", wellFormed)
			}
		case xml.ProcInst:
			if strings.EqualFold(tok.Target, "xml") && (start > 0 || tok.Target != "xml") {
				err = s.fail(start, "", "an XML declaration that isn't at the start", wellFormed)
			}
		case xml.Directive:
			err = s.fail(start, "", "a document type declaration", "none: libvirt writes none")
		}
		if err != nil {
			return err
		}
	}
	switch {
	case len(s.stack) > 0:
		return s.fail(len(data), "", "ends before </"+shorten(s.top().name())+">", wellFormed)
	case !rootSeen:
		return s.fail(len(data), "", "no element", wellFormed)
	}
	return nil
}

func (s *scanner) top() *element { return s.stack[len(s.stack)-1] }

// checkBytes refuses what no XML document holds wherever it stands: encoding/xml looks for these in
// text and values only.
func (s *scanner) checkBytes() error {
	switch {
	case len(trimSpace(s.data)) == 0:
		return &Error{Reason: "empty", Allowed: "one XML document"}
	case len(s.data) > maxSize:
		return &Error{Reason: fmt.Sprintf("%d bytes long", len(s.data)), Allowed: "at most 16 MiB"}
	}
	for i := 0; i < len(s.data); {
		c := s.data[i]
		size := 1
		bad := c < ' ' && !isSpace(c)
		if c >= utf8.RuneSelf {
			var r rune
			r, size = utf8.DecodeRune(s.data[i:])
			if r == utf8.RuneError && size == 1 {
				return s.fail(i, "", fmt.Sprintf("byte 0x%02x isn't UTF-8", c), "text in UTF-8")
			}
			bad = r == 0xfffe || r == 0xffff
		}
		if bad {
			return s.fail(i, "", fmt.Sprintf("byte 0x%02x", c), "text without control characters")
		}
		i += size
	}
	return nil
}

func (s *scanner) push(tok xml.StartElement, start, end int, h handler) error {
	if len(s.stack) == maxDepth {
		return s.fail(start, "", "elements nested too deep", fmt.Sprintf("%d levels", maxDepth))
	}
	e := &element{prefix: tok.Name.Space, local: tok.Name.Local, start: start, tagEnd: end}
	if len(s.stack) > 0 && s.top().firstChild == 0 {
		s.top().firstChild = start
	}
	s.stack = append(s.stack, e)
	if strings.Contains(e.local, ":") {
		return s.fail(start, "", "element name "+quote(e.name())+" has a misplaced colon", "name or prefix:name")
	}
	if err := s.readAttrs(e, tok.Attr); err != nil {
		return err
	}
	ns, ok := s.lookup(e.prefix)
	if !ok {
		return s.undeclared(start, "", e.prefix)
	}
	e.ns = ns
	return h.open(s, e)
}

func (s *scanner) pop(tok xml.EndElement, start, end int, h handler) error {
	name := join(tok.Name.Space, tok.Name.Local)
	if len(s.stack) == 0 {
		return s.fail(start, "", "</"+shorten(name)+"> closes nothing", wellFormed)
	}
	e := s.top()
	if e.prefix != tok.Name.Space || e.local != tok.Name.Local {
		return s.fail(start, "", "closed by </"+shorten(name)+">", "</"+shorten(e.name())+">")
	}
	e.closeStart, e.end = start, end
	if err := h.close(s, e); err != nil {
		return err
	}
	for i := range e.attrs {
		if a := &e.attrs[i]; a.isNamespace() {
			prefix := declares(a)
			s.bound[prefix] = s.bound[prefix][:len(s.bound[prefix])-1]
		}
	}
	s.stack = s.stack[:len(s.stack)-1]
	return nil
}

// declares returns the prefix that a namespace declaration binds; "" is the default namespace.
func declares(a *attr) string {
	if a.prefix == "" {
		return ""
	}
	return a.local
}

func (s *scanner) lookup(prefix string) (ns string, ok bool) {
	uris := s.bound[prefix]
	if len(uris) == 0 {
		return "", false
	}
	return uris[len(uris)-1], true
}

// readAttrs gives e its attributes, with their offsets, and binds the namespaces that it declares.
func (s *scanner) readAttrs(e *element, raw []xml.Attr) error {
	tag := s.data[e.start:e.tagEnd]
	i := 1
	for i < len(tag) && !isSpace(tag[i]) && tag[i] != '/' && tag[i] != '>' {
		i++
	}
	e.attrs = make([]attr, 0, len(raw))
	written := make(map[string]bool, len(raw))
	for _, r := range raw {
		a := attr{prefix: r.Name.Space, local: r.Name.Local, value: r.Value}
		if err := s.place(&a, e, i); err != nil {
			return err
		}
		i = a.end - e.start
		at := "/@" + shorten(a.name())
		if strings.Contains(a.local, ":") || a.local == "" {
			return s.fail(a.start, at, "a misplaced colon", "name or prefix:name")
		}
		if written[a.name()] {
			return s.fail(a.start, at, "given twice", "once")
		}
		written[a.name()] = true
		if a.isNamespace() {
			prefix := declares(&a)
			if reason := misdeclared(&a); reason != "" {
				return s.fail(a.start, at, reason, "a namespace of its own")
			}
			s.bound[prefix] = append(s.bound[prefix], a.value)
		}
		e.attrs = append(e.attrs, a)
	}
	return s.expand(e)
}

// place finds where the next attribute stands in e's start tag, of which i bytes were read already.
func (s *scanner) place(a *attr, e *element, i int) error {
	tag := s.data[e.start:e.tagEnd]
	from := i
	i = skipSpace(tag, i)
	a.start = e.start + i
	if i == from {
		return s.fail(a.start, "", "no space before attribute "+quote(a.name()), wellFormed)
	}
	// encoding/xml has read this tag before: there is a =, and the value is quoted.
	eq := bytes.IndexByte(tag[i:], '=')
	if eq < 0 {
		return s.fail(a.start, "", "broken start tag", wellFormed)
	}
	i = skipSpace(tag, i+eq+1)
	length := -1
	if i < len(tag) {
		length = bytes.IndexByte(tag[i+1:], tag[i])
	}
	if length < 0 {
		return s.fail(a.start, "", "broken start tag", wellFormed)
	}
	a.valueStart = e.start + i + 1
	a.valueEnd = a.valueStart + length
	a.end = a.valueEnd + 1
	return nil
}

// expand resolves the prefixes of e's attributes, which may stand before the declaration of theirs.
func (s *scanner) expand(e *element) error {
	var expanded map[string]bool
	for i := range e.attrs {
		a := &e.attrs[i]
		if a.prefix == "" || a.isNamespace() {
			continue
		}
		at := "/@" + shorten(a.name())
		ns, ok := s.lookup(a.prefix)
		if !ok {
			return s.undeclared(a.start, at, a.prefix)
		}
		a.ns = ns
		if expanded == nil {
			expanded = make(map[string]bool)
		}
		if expanded[ns+" "+a.local] {
			return s.fail(a.start, at, "given twice, with two prefixes of one namespace", "once")
		}
		expanded[ns+" "+a.local] = true
	}
	return nil
}

// misdeclared says what Namespaces in XML 1.0, section 3, forbids about a declaration.
func misdeclared(a *attr) string {
	prefix := declares(a)
	switch {
	case prefix == "xmlns" || a.value == xmlnsNamespace:
		return "xmlns can't be declared"
	case (prefix == "xml") != (a.value == xmlNamespace):
		return "prefix xml belongs to " + xmlNamespace
	case prefix != "" && a.value == "":
		return "an empty namespace"
	}
	return ""
}

func (s *scanner) undeclared(at int, suffix, prefix string) error {
	allowed := "a declared prefix"
	if prefix == Prefix {
		allowed = `xmlns:` + Prefix + `="` + Namespace + `" on the element`
	}
	return s.fail(at, suffix, "prefix "+quote(prefix)+" isn't declared", allowed)
}

// broken turns an error of encoding/xml into ours.
func (s *scanner) broken(at int, err error) error {
	reason := strings.TrimPrefix(err.Error(), "xml: ")
	var syntax *xml.SyntaxError
	switch {
	case errors.Is(err, errCharset):
		return s.fail(at, "", errCharset.Error(), "text in UTF-8")
	case errors.As(err, &syntax):
		reason = syntax.Msg
	}
	return s.fail(at, "", "broken XML: "+shorten(reason), wellFormed)
}

// fail makes the error for the byte at offset at, in the innermost element that is open.
func (s *scanner) fail(at int, suffix, reason, allowed string) *Error {
	line := 1 + bytes.Count(s.data[:min(at, len(s.data))], []byte("\n"))
	return &Error{Path: s.path() + suffix, Line: line, Reason: reason, Allowed: allowed}
}

// path names the open elements; the middle of a very deep one is left out.
func (s *scanner) path() string {
	const shown = 5
	var b strings.Builder
	for i, e := range s.stack {
		if i >= shown && i < len(s.stack)-shown {
			if i == shown {
				b.WriteString("/…")
			}
			continue
		}
		b.WriteString("/" + shorten(e.name()))
		if e.index > 0 {
			b.WriteString("[" + strconv.Itoa(e.index) + "]")
		}
	}
	return b.String()
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

func skipSpace(b []byte, i int) int {
	for i < len(b) && isSpace(b[i]) {
		i++
	}
	return i
}

// trimSpace trims what XML calls white space, which is less than Unicode does.
func trimSpace(b []byte) []byte { return bytes.Trim(b, " \t\r\n") }
