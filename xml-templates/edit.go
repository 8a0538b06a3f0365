package metadata

import (
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"ftclock/host"
)

// qemuPrefix is the one that libvirt's documentation uses for qemuNamespace.
const qemuPrefix = "qemu"

// EditOptions say what Enable puts into a domain.
type EditOptions struct {
	Policy Policy
	// Preload is the absolute path of Module, to be loaded by the dynamic linker. Empty: leave
	// LD_PRELOAD alone.
	Preload string
}

// Enable returns the domain with the clock element of o in it, in place of the one that it may have.
// Every other byte stays as it is. Nothing changes when the domain already is as o says.
func Enable(xml []byte, o EditOptions) ([]byte, error) {
	if o.Preload != "" && (!path.IsAbs(o.Preload) || path.Base(o.Preload) != Module || !plain(o.Preload)) {
		return nil, fmt.Errorf("preloading %s: want an absolute path to %s, without spaces, colons and quotes",
			quote(o.Preload), Module)
	}
	if _, err := ParseElement([]byte(o.Policy.XML())); err != nil {
		return nil, fmt.Errorf("checking policy: %w", err)
	}
	d, err := readEditable(xml)
	if err != nil {
		return nil, err
	}
	if d.domain.Name == "" {
		return nil, &Error{Path: "/domain", Reason: "no name", Allowed: "a domain with a <name>"}
	}
	var edits []edit
	if p := d.domain.Policy; p == nil || *p != o.Policy {
		edits = append(edits, d.putClock(o.Policy))
	}
	if o.Preload != "" {
		edits = append(edits, d.putPreload(o.Preload)...)
	}
	out := apply(xml, edits)
	// The result is what libvirt gets to see: read it as the hook will.
	got, err := Parse(out)
	if err != nil {
		return nil, fmt.Errorf("checking edited domain: %w", err)
	}
	if got.Policy == nil || *got.Policy != o.Policy || o.Preload != "" && !got.Preload {
		return nil, fmt.Errorf("checking edited domain: it doesn't read as it was written")
	}
	return out, nil
}

// Disable returns the domain without the clock element and without Module in LD_PRELOAD. What is left
// empty by that goes too: LD_PRELOAD, <qemu:commandline> with its namespace, <metadata>. A clock
// element with errors in it can be removed, one in a wrong place can't.
func Disable(xml []byte) ([]byte, error) {
	d, err := readEditable(xml)
	if err != nil {
		return nil, err
	}
	edits := d.dropPreload()
	if d.clock != nil {
		edits = append(edits, d.drop(d.clock, d.metadata))
	}
	return apply(xml, edits), nil
}

// edit replaces data[from:to].
type edit struct {
	from, to int
	text     string
}

// apply makes edits that don't overlap. Insertions at one place keep their order.
func apply(data []byte, edits []edit) []byte {
	slices.SortStableFunc(edits, func(a, b edit) int { return a.from - b.from })
	var out []byte
	at := 0
	for _, e := range edits {
		out = append(out, data[at:e.from]...)
		out = append(out, e.text...)
		at = e.to
	}
	return append(out, data[at:]...)
}

func (d *document) putClock(p Policy) edit {
	clock := func(lead string) string { return p.element(lead, d.unit()) }
	switch {
	case d.clock != nil:
		return edit{d.clock.start, d.clock.end, clock(d.lead(d.clock.start))}
	case d.metadata != nil:
		return d.appendTo(d.metadata, clock)
	}
	lead := ""
	if d.endsLine(d.header.end) {
		lead = d.lead(d.header.start)
	}
	inner := ""
	if lead != "" {
		inner = lead + d.unit()
	}
	return edit{d.header.end, d.header.end, lead + "<metadata>" + inner + clock(inner) + lead + "</metadata>"}
}

func (d *document) putPreload(module string) []edit {
	if n := len(d.preloads); n > 0 {
		env := d.preloads[n-1].env
		a := env.attr("value")
		if a == nil {
			end := env.attr("name").end
			return []edit{{end, end, " value='" + module + "'"}}
		}
		return d.rewrite(a, func(value string) string { return addModule(value, module) })
	}
	env := func(prefix string) string {
		return "<" + join(prefix, "env") + " name='" + preloadVariable + "' value='" + module + "'/>"
	}
	if c := d.commandline; c != nil {
		return []edit{d.appendTo(c, func(string) string { return env(c.prefix) })}
	}
	prefix, declaration := qemuPrefix, " xmlns:"+qemuPrefix+"='"+qemuNamespace+"'"
	var edits []edit
	switch a := d.root.declaration(qemuNamespace, qemuPrefix); {
	case a == nil: // the usual case: declare it where libvirt does
		end := d.root.tagNameEnd()
		edits = append(edits, edit{end, end, declaration})
		declaration = ""
	case a.value == qemuNamespace:
		prefix, declaration = a.local, ""
	}
	return append(edits, d.appendTo(d.root, func(lead string) string {
		name := join(prefix, "commandline")
		inner := ""
		if lead != "" {
			inner = lead + d.unit()
		}
		return "<" + name + declaration + ">" + inner + env(prefix) + lead + "</" + name + ">"
	}))
}

// declaration returns the attribute that binds a prefix to ns, or else the one that binds prefix.
func (e *element) declaration(ns, prefix string) *attr {
	var taken *attr
	for i := range e.attrs {
		switch a := &e.attrs[i]; {
		case a.prefix == "xmlns" && a.value == ns:
			return a
		case a.prefix == "xmlns" && a.local == prefix:
			taken = a
		}
	}
	return taken
}

// tagNameEnd is where another attribute can be added.
func (e *element) tagNameEnd() int {
	if n := len(e.attrs); n > 0 {
		return e.attrs[n-1].end
	}
	return e.start + len("<") + len(e.name())
}

// dropPreload takes Module out of every LD_PRELOAD.
func (d *document) dropPreload() []edit {
	var edits []edit
	gone := make(map[*element][]*element) // by commandline: the envs that go
	for _, p := range d.preloads {
		switch {
		case !namesModule(p.value()):
		case strings.Trim(dropModule(p.value()), separators) == "":
			gone[p.commandline] = append(gone[p.commandline], p.env)
		default:
			edits = append(edits, d.rewrite(p.env.attr("value"), dropModule)...)
		}
	}
	removedUses := 0
	for commandline, envs := range gone {
		if d.emptyWithout(commandline, envs...) {
			edits = append(edits, d.remove(commandline))
			for _, e := range append(envs, commandline) {
				if e.prefix == qemuPrefix {
					removedUses++
				}
			}
			continue
		}
		for _, e := range envs {
			edits = append(edits, d.remove(e))
		}
	}
	if a := d.root.declaration(qemuNamespace, qemuPrefix); a != nil && a.local == qemuPrefix &&
		a.value == qemuNamespace && removedUses > 0 && removedUses == d.prefixUses {
		edits = append(edits, edit{len(bytes.TrimRight(d.data[:a.start], " \t\r\n")), a.end, ""})
	}
	return edits
}

// drop removes e, and its parent when that would be empty.
func (d *document) drop(e, parent *element) edit {
	if d.emptyWithout(parent, e) {
		return d.remove(parent)
	}
	return d.remove(e)
}

// emptyWithout tells whether an element holds nothing but these children and white space.
func (d *document) emptyWithout(e *element, children ...*element) bool {
	at := e.tagEnd
	for _, c := range children {
		if len(trimSpace(d.data[at:c.start])) > 0 {
			return false
		}
		at = c.end
	}
	return len(trimSpace(d.data[at:e.closeStart])) == 0
}

// remove cuts an element out, with its line when it has lines of its own.
func (d *document) remove(e *element) edit {
	from := e.start
	if d.endsLine(e.end) {
		from -= len(d.lead(e.start))
	}
	return edit{from, e.end, ""}
}

// appendTo makes text the last child of e. text is given what starts a line at its indentation.
func (d *document) appendTo(e *element, text func(lead string) string) edit {
	outer := d.lead(e.start)
	inner := ""
	switch {
	case e.firstChild > 0:
		inner = d.lead(e.firstChild)
	case outer != "":
		inner = outer + d.unit()
	}
	if e.tagEnd == e.end { // <e/>
		from := len(bytes.TrimRight(d.data[:e.tagEnd-len("/>")], " \t\r\n"))
		return edit{from, e.end, ">" + inner + text(inner) + outer + "</" + e.name() + ">"}
	}
	content := bytes.TrimRight(d.data[e.tagEnd:e.closeStart], " \t\r\n")
	at := e.tagEnd + len(content)
	if len(content) == 0 {
		return edit{at, e.closeStart, inner + text(inner) + outer}
	}
	return edit{at, at, inner + text(inner)}
}

// rewrite changes an attribute's value, as written when nothing in it is escaped.
func (d *document) rewrite(a *attr, change func(string) string) []edit {
	raw := string(d.data[a.valueStart:a.valueEnd])
	var text string
	if quote := d.data[a.valueEnd]; strings.Contains(raw, "&") {
		text = escape(change(a.value), quote)
	} else {
		text = change(raw)
	}
	if text == raw {
		return nil
	}
	return []edit{{a.valueStart, a.valueEnd, text}}
}

// lead is the newline and the indentation before offset at, or nothing when at is within a line.
func (d *document) lead(at int) string {
	i := len(bytes.TrimRight(d.data[:at], " \t"))
	switch {
	case bytes.HasSuffix(d.data[:i], []byte("\r\n")):
		i -= 2
	case bytes.HasSuffix(d.data[:i], []byte("\n")):
		i--
	default:
		return ""
	}
	return string(d.data[i:at])
}

// endsLine tells whether offset at is followed by a newline or an end tag.
func (d *document) endsLine(at int) bool {
	rest := bytes.TrimLeft(d.data[at:], " \t")
	return len(rest) == 0 || rest[0] == '\n' || rest[0] == '\r' || bytes.HasPrefix(rest, []byte("</"))
}

// unit is one step of the document's indentation.
func (d *document) unit() string {
	before := d.data[:d.root.start]
	own := string(before[len(bytes.TrimRight(before, " \t")):])
	child := strings.TrimLeft(d.lead(d.root.firstChild), "\r\n")
	if unit := strings.TrimPrefix(child, own); unit != "" {
		return unit
	}
	return "  "
}

// separators are those of LD_PRELOAD, see ld.so(8), with the white space that a value may be wrapped in.
const separators = ": \t\r\n"

func namesModule(value string) bool {
	return slices.ContainsFunc(strings.FieldsFunc(value, separates), isModule)
}

func separates(r rune) bool { return strings.ContainsRune(separators, r) }

func isModule(library string) bool { return path.Base(library) == Module }

// addModule puts module into a value of LD_PRELOAD, last, or in place of another copy of Module.
func addModule(value, module string) string {
	switch {
	case strings.Trim(value, separators) == "":
		return module
	case !namesModule(value):
		return value + ":" + module
	}
	var out strings.Builder
	placed := false
	for _, part := range splitPreload(value) {
		if isModule(part.library) {
			if placed {
				continue
			}
			part.library = module
			placed = true
		}
		out.WriteString(part.separator + part.library)
	}
	return out.String()
}

// dropModule takes every copy of Module out of a value of LD_PRELOAD. The others stay as written.
func dropModule(value string) string {
	var out strings.Builder
	for i, part := range splitPreload(value) {
		switch {
		case isModule(part.library):
		case i > 0 && out.Len() == 0: // the separator stood behind Module
			out.WriteString(part.library)
		default:
			out.WriteString(part.separator + part.library)
		}
	}
	return out.String()
}

// part is a library of LD_PRELOAD with the separators before it. The last may have no library.
type part struct{ separator, library string }

func splitPreload(value string) []part {
	var parts []part
	for value != "" {
		rest := strings.TrimLeft(value, separators)
		end := strings.IndexFunc(rest, separates)
		if end < 0 {
			end = len(rest)
		}
		parts = append(parts, part{value[:len(value)-len(rest)], rest[:end]})
		value = rest[end:]
	}
	return parts
}

// plain tells whether a path can stand in LD_PRELOAD and in XML as it is.
func plain(s string) bool {
	return !strings.ContainsAny(s, separators+`&<>'"`) && utf8.ValidString(s) && host.Printable(s) == s
}

// escape writes s as an attribute's value between two of quote.
func escape(s string, quote byte) string {
	s = strings.NewReplacer("&", "&amp;", "<", "&lt;", "\t", "&#9;", "\n", "&#10;", "\r", "&#13;").Replace(s)
	if quote == '"' {
		return strings.ReplaceAll(s, `"`, "&quot;")
	}
	return strings.ReplaceAll(s, "'", "&apos;")
}
