package metadata

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
)

// in puts an element into the metadata of a domain; it starts on line 3.
func in(element string) string {
	return "<domain type='kvm' id='7'>\n  <name>vm1</name><metadata>\n" + element + "\n</metadata>\n</domain>\n"
}

// clock is a clock element with this content; the content starts on its second line.
func clock(content string) string {
	return "<ftclock:clock xmlns:ftclock=\"urn:ftclock:domain:1\">\n" + content + "\n</ftclock:clock>"
}

func on(attrs string) string { return clock("<ftclock:on " + attrs + "/>") }

func policy(change func(*Policy)) Policy {
	p := Default()
	change(&p)
	return p
}

// goodElements are clock elements and what they mean.
var goodElements = []struct {
	name, xml string
	want      Policy
}{
	{"minimal", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`, Default()},
	{"another prefix", `<c:clock xmlns:c='urn:ftclock:domain:1'><c:on event='suspend'/></c:clock>`, Default()},
	{"no prefix", `<clock xmlns='urn:ftclock:domain:1' required='no'><on event='suspend'/></clock>`,
		policy(func(p *Policy) { p.Required = false })},
	{"two prefixes", `<a:clock xmlns:a='urn:ftclock:domain:1'><on xmlns='urn:ftclock:domain:1' event='suspend'/></a:clock>`,
		Default()},
	{"unused declaration", `<c:clock xmlns:c='urn:ftclock:domain:1' xmlns:d='urn:d' xmlns='urn:e'/>`, Default()},
	{"utc", `<ftclock:clock reference="utc" xmlns:ftclock="urn:ftclock:domain:1"/>`,
		policy(func(p *Policy) { p.Reference = UTC })},
	{"slew", `<ftclock:clock reference="utc" slew="100ppm" xmlns:ftclock="urn:ftclock:domain:1"/>`,
		policy(func(p *Policy) { p.Reference, p.Slew = UTC, 100 })},
	{"slew of the default", `<ftclock:clock slew="500ppm" xmlns:ftclock="urn:ftclock:domain:1"/>`, Default()},
	{"monitor", `<ftclock:clock monitor="direct" xmlns:ftclock="urn:ftclock:domain:1"/>`, policy(func(p *Policy) { p.Monitor = Direct })},
	{"monitor of the default", `<ftclock:clock monitor="relayed" xmlns:ftclock="urn:ftclock:domain:1"/>`, Default()},
	{"attributes in any order", `<ftclock:clock required="yes" xmlns:ftclock="urn:ftclock:domain:1" reference="raw"/>`, Default()},
	{"comments and white space", clock("<!-- <ftclock:on/> --><?app hint?>\t\r\n<ftclock:on event='suspend'> <!-- - --> </ftclock:on>"), Default()},
	{"escaped value", on(`event="sus&#112;end" do="catch&#x2d;up"`),
		policy(func(p *Policy) { p.Suspend = Rule{CatchUp, 0} })},
	{"limit before event", on(`limit="1m" do='catch-up' event="restore"`),
		policy(func(p *Policy) { p.Restore = Rule{CatchUp, time.Minute} })},
	{"checkpoint limit", on(`event="checkpoint" limit="1ms"`),
		policy(func(p *Policy) { p.Checkpoint.Limit = time.Millisecond })},
	{"checkpoint hold", on(`event="checkpoint" do="hold"`),
		policy(func(p *Policy) { p.Checkpoint.Do = Hold })},
	{"checkpoint hold with border", on(`event="checkpoint" do="hold" limit="200ms"`),
		policy(func(p *Policy) { p.Checkpoint = Rule{Hold, 200 * time.Millisecond} })},
	{"migrate hold", on(`event="migrate" do="hold"`), policy(func(p *Policy) { p.Migrate = Rule{Hold, 0} })},
	{"migrate limit", on(`event="migrate" limit="2min"`),
		policy(func(p *Policy) { p.Migrate.Limit = 2 * time.Minute })},
	{"suspend catch-up", on(`event="suspend" do="catch-up"`), policy(func(p *Policy) { p.Suspend.Do = CatchUp })},
	{"all", clock(`<ftclock:on event="migrate" do="hold"/>
		<ftclock:on event="restore" do="catch-up"/>
		<ftclock:on event="suspend" do="catch-up" limit="900s"/>
		<ftclock:on event="checkpoint" limit="0.25s"/>`),
		policy(func(p *Policy) {
			p.Migrate = Rule{Hold, 0}
			p.Restore = Rule{CatchUp, 0}
			p.Suspend = Rule{CatchUp, MaxLimit}
			p.Checkpoint.Limit = 250 * time.Millisecond
		})},
}

func TestParse(t *testing.T) {
	for _, tt := range goodElements {
		t.Run(tt.name, func(t *testing.T) {
			d := check.Value(Parse([]byte(in(tt.xml))))(t)
			want := Domain{ID: 7, Name: "vm1", Type: "kvm", Policy: &tt.want}
			if !reflect.DeepEqual(d, want) {
				t.Errorf("got %+v %+v\nwant %+v", d, d.Policy, tt.want)
			}
			p, err := ParseElement([]byte(tt.xml))
			if err != nil || p != tt.want {
				t.Errorf("element: got %+v, %v", p, err)
			}
		})
	}
}

func TestParseDomain(t *testing.T) {
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	const qemu = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
	env := func(name, value string) string { return "<qemu:env name='" + name + "' value='" + value + "'/>" }
	preload := func(envs string) string {
		return "<domain" + qemu + "><qemu:commandline>" + envs + "</qemu:commandline></domain>"
	}
	for _, tt := range []struct {
		name, xml string
		want      Domain
	}{
		{"all", "<?xml version='1.0' encoding='utf-8'?><domain type='qemu' id='12'><name>a<!-- b -->&amp;c</name><uuid>" + uuid +
			"</uuid><devices><name>no</name></devices></domain>", Domain{ID: 12, Name: "a&c", UUID: uuid, Type: "qemu"}},
		{"nothing", "<domain/>", Domain{ID: -1}},
		{"first name", "<domain><name>a</name><name>b</name></domain>", Domain{ID: -1, Name: "a"}},
		{"clock of libvirt", "<domain><clock offset='utc'><timer name='rtc'/></clock></domain>", Domain{ID: -1}},
		{"metadata of others", "<domain><metadata><o:clock xmlns:o='urn:o'><clock/></o:clock></metadata></domain>", Domain{ID: -1}},
		{"comment", "<domain><metadata><!--" + on("") + "--></metadata></domain>", Domain{ID: -1}},
		{"preload", preload(env("LD_PRELOAD", testModule)), Domain{ID: -1, Preload: true}},
		{"preload with others", preload(env("LD_PRELOAD", "/a.so:/x/"+Module+" b.so")), Domain{ID: -1, Preload: true}},
		{"preload of others", preload(env("LD_PRELOAD", "/a.so:/"+Module+".1")), Domain{ID: -1}},
		{"another variable", preload(env("LD_LIBRARY_PATH", testModule)), Domain{ID: -1}},
		{"the last preload counts", preload(env("LD_PRELOAD", testModule) + env("LD_PRELOAD", "/a.so")), Domain{ID: -1}},
		{"preload elsewhere", "<domain" + qemu + "><devices>" + env("LD_PRELOAD", testModule) + "</devices></domain>", Domain{ID: -1}},
		{"preload of another namespace", strings.Replace(preload(env("LD_PRELOAD", testModule)), "qemu/1.0", "lxc/1.0", 1), Domain{ID: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := check.Value(Parse([]byte(tt.xml)))(t)
			if !reflect.DeepEqual(d, tt.want) {
				t.Errorf("got %+v, want %+v", d, tt.want)
			}
		})
	}
}

const (
	atClock = "/domain/metadata/ftclock:clock"
	atOn    = atClock + "/ftclock:on[1]"
	limits  = `; allowed: 1ms to 15m, a number and its unit (ms, s, m or min), such as "250ms" or "1.5s"`
	events  = "checkpoint, suspend, restore, migrate"
	theTag  = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">`
	theXML  = "; allowed: well-formed XML, such as libvirt writes"
)

const slews = `allowed: 1ppm to 100000ppm, a whole number and its unit, such as "500ppm"`

// badElements are wrong whatever stands around them. The errors are those of Parse.
var badElements = []struct{ name, xml, err string }{
	{"unknown attribute", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" referense="utc"/>`,
		atClock + "/@referense (line 3): unknown attribute; allowed: reference, slew, monitor, required"},
	{"attribute with prefix", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"
		ftclock:reference="utc"/>`,
		atClock + "/@ftclock:reference (line 4): unknown attribute; allowed: reference, slew, monitor, required"},
	{"attribute of xml", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" xml:lang="en"/>`,
		atClock + "/@xml:lang (line 3): unknown attribute; allowed: reference, slew, monitor, required"},
	{"reference", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="UTC"/>`,
		atClock + `/@reference (line 3): unknown value "UTC"; allowed: raw, utc`},
	{"reference with space", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference=" utc"/>`,
		atClock + `/@reference (line 3): unknown value " utc"; allowed: raw, utc`},
	{"slew without unit", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="500"/>`,
		atClock + `/@slew (line 3): "500" has no unit; ` + slews},
	{"slew too fast", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="100001ppm"/>`,
		atClock + `/@slew (line 3): "100001ppm" is too fast; ` + slews},
	{"slew of nothing", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="0ppm"/>`,
		atClock + `/@slew (line 3): "0ppm" is too slow; ` + slews},
	{"slew below nothing", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="-1ppm"/>`,
		atClock + `/@slew (line 3): "-1ppm" is negative; ` + slews},
	{"slew in hex", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="0x1ppm"/>`,
		atClock + `/@slew (line 3): "0x1ppm" isn't a plain number and a unit; ` + slews},
	{"monitor", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" monitor="none"/>`,
		atClock + `/@monitor (line 3): unknown value "none"; allowed: relayed, direct`},
	{"required", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="true"/>`,
		atClock + `/@required (line 3): unknown value "true"; allowed: yes, no`},
	{"text", clock("hold"), atClock + ` (line 4): text "hold"; allowed: no text`},
	{"text by reference", clock("&#104;&#xa;old"), atClock + ` (line 4): text "h\nold"; allowed: no text`},
	{"text in CDATA", clock("\n<![CDATA[x]]>"), atClock + ` (line 5): text "x"; allowed: no text`},
	{"text in on", clock("<ftclock:on event='suspend'>\n hold</ftclock:on>"), atOn + ` (line 5): text "hold"; allowed: no text`},
	{"unknown element", clock("<ftclock:pause/>"),
		atClock + `/ftclock:pause (line 4): unknown element; allowed: elements "on" of namespace urn:ftclock:domain:1`},
	{"foreign element", clock("<o:on xmlns:o='urn:o' event='suspend'/>"),
		atClock + `/o:on (line 4): unknown element; allowed: elements "on" of namespace urn:ftclock:domain:1`},
	{"on without namespace", clock("<on event='suspend'/>"),
		atClock + `/on (line 4): unknown element; allowed: elements "on" of namespace urn:ftclock:domain:1`},
	{"clock in clock", clock(clock("")),
		atClock + `/ftclock:clock (line 4): unknown element; allowed: elements "on" of namespace urn:ftclock:domain:1`},
	{"element in on", clock("<ftclock:on event='suspend'><ftclock:on event='restore'/></ftclock:on>"),
		atOn + `/ftclock:on (line 4): unknown element; allowed: an empty element "ftclock:on"`},
	{"no event", on(`do="hold"`), atOn + " (line 4): no event; allowed: event= one of " + events},
	{"empty event", on(`event=""`), atOn + `/@event (line 4): unknown value ""; allowed: ` + events},
	{"unknown event", clock("<ftclock:on event='suspend'/>\n<ftclock:on event='resume'/>"),
		atClock + `/ftclock:on[2]/@event (line 5): unknown value "resume"; allowed: ` + events},
	{"event twice", clock("<ftclock:on event='suspend'/>\n<ftclock:on event='migrate'/><ftclock:on\nevent='suspend'/>"),
		atClock + `/ftclock:on[3]/@event (line 6): a second rule for suspend; allowed: one for each event`},
	{"unknown do", on(`event="suspend" do="catchup"`), atOn + `/@do (line 4): unknown value "catchup"; allowed: catch-up, hold`},
	{"unknown attribute of on", on(`event="suspend" until="5s"`),
		atOn + `/@until (line 4): unknown attribute; allowed: event, do, limit`},
	{"limit on default hold", on(`event="suspend" limit="5s"`),
		atOn + `/@limit (line 4): a limit, but suspend is held however long it is; allowed: no limit, or do="catch-up"`},
	{"limit on hold", on(`event="migrate" do="hold" limit="5s"`),
		atOn + `/@limit (line 4): a limit, but migrate is held however long it is; allowed: no limit, or do="catch-up"`},
	{"unit missing", on(`event="checkpoint" limit="10"`), atOn + `/@limit (line 4): "10" has no unit` + limits},
	{"unit unknown", on(`event="checkpoint" limit="10us"`), atOn + `/@limit (line 4): "10us" has an unknown unit "us"` + limits},
	{"unit in capitals", on(`event="checkpoint" limit="10S"`), atOn + `/@limit (line 4): "10S" has an unknown unit "S"` + limits},
	{"number missing", on(`event="checkpoint" limit="none"`), atOn + `/@limit (line 4): "none" has no number` + limits},
	{"limit empty", on(`event="checkpoint" limit=""`), atOn + `/@limit (line 4): "" has no number` + limits},
	{"limit negative", on(`event="checkpoint" limit="-10s"`), atOn + `/@limit (line 4): "-10s" is negative` + limits},
	{"limit zero", on(`event="checkpoint" limit="0s"`), atOn + `/@limit (line 4): "0s" is too short` + limits},
	{"limit too short", on(`event="checkpoint" limit="0.999999ms"`), atOn + `/@limit (line 4): "0.999999ms" is too short` + limits},
	{"limit too long", on(`event="migrate" limit="15.000001m"`), atOn + `/@limit (line 4): "15.000001m" is too long` + limits},
	{"limit of an hour", on(`event="migrate" limit="60min"`), atOn + `/@limit (line 4): "60min" is too long` + limits},
	{"limit overflows", on(`event="migrate" limit="18446744073709551617s"`),
		atOn + `/@limit (line 4): "18446744073709551617s" is too long` + limits},
	{"limit endless", on(`event="migrate" limit="` + strings.Repeat("9", 10000) + `s"`),
		atOn + `/@limit (line 4): "` + strings.Repeat("9", 60) + `…" is too long` + limits},
	{"two units", on(`event="migrate" limit="1m30s"`), atOn + `/@limit (line 4): "1m30s" isn't a plain number and a unit` + limits},
	{"space in limit", on(`event="migrate" limit="10 s"`), atOn + `/@limit (line 4): "10 s" isn't a plain number and a unit` + limits},
	{"exponent", on(`event="migrate" limit="1e1s"`), atOn + `/@limit (line 4): "1e1s" isn't a plain number and a unit` + limits},
	{"no whole number", on(`event="migrate" limit=".5s"`), atOn + `/@limit (line 4): ".5s" isn't a plain number and a unit` + limits},
	{"no decimals", on(`event="migrate" limit="5.s"`), atOn + `/@limit (line 4): "5.s" isn't a plain number and a unit` + limits},
	{"comma", on(`event="migrate" limit="1,5s"`), atOn + `/@limit (line 4): "1,5s" isn't a plain number and a unit` + limits},
	{"plus", on(`event="migrate" limit="+5s"`), atOn + `/@limit (line 4): "+5s" isn't a plain number and a unit` + limits},
	{"leading zero", on(`event="migrate" limit="05s"`), atOn + `/@limit (line 4): "05s" isn't a plain number and a unit` + limits},
	{"digits of elsewhere", on(`event="migrate" limit="٣s"`), atOn + `/@limit (line 4): "٣s" isn't a plain number and a unit` + limits},
	{"too many decimals", on(`event="migrate" limit="1.0000000s"`), atOn + `/@limit (line 4): "1.0000000s" has more than 6 decimals` + limits},
	{"attribute twice", on("event=\"migrate\" do='hold'\ndo='hold'"), atOn[:len(atOn)-3] + `/@do (line 5): given twice; allowed: once`},
	{"no space", on(`event="migrate"do="hold"`), atOn[:len(atOn)-3] + ` (line 4): no space before attribute "do"` + theXML},
	{"control character", on("event=\"migrate\x01\""), `XML (line 4): byte 0x01; allowed: text without control characters`},
	{"undeclared prefix", `<ftclock:clock/>`,
		atClock + ` (line 3): prefix "ftclock" isn't declared; allowed: xmlns:ftclock="urn:ftclock:domain:1" on the element`},
	{"undeclared prefix inside", `<clock xmlns="urn:ftclock:domain:1"><c:on event="suspend"/></clock>`,
		`/domain/metadata/clock/c:on (line 3): prefix "c" isn't declared; allowed: a declared prefix`},
	{"declared elsewhere", `<o:clock><o:on xmlns:o="urn:ftclock:domain:1"/></o:clock>`,
		`/domain/metadata/o:clock (line 3): prefix "o" isn't declared; allowed: a declared prefix`},
	{"future version", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:2"/>`,
		atClock + ` (line 3): unknown namespace "urn:ftclock:domain:2"; allowed: urn:ftclock:domain:1`},
	{"unclosed", `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">`,
		atClock + ` (line 4): closed by </metadata>; allowed: </ftclock:clock>`},
}

// badDomains are wrong as domains.
var badDomains = []struct{ name, xml, err string }{
	{"empty", "", "XML: empty; allowed: one XML document"},
	{"blank", " \n", "XML: empty; allowed: one XML document"},
	{"NUL", "<domain>\n\x00</domain>", "XML (line 2): byte 0x00; allowed: text without control characters"},
	{"NUL in comment", "<domain><!-- \x00 --></domain>", "XML (line 1): byte 0x00; allowed: text without control characters"},
	{"Latin-1", "<domain>\n\n\xe9</domain>", "XML (line 3): byte 0xe9 isn't UTF-8; allowed: text in UTF-8"},
	{"declared Latin-1", "<?xml version='1.0' encoding='ISO-8859-1'?>\n<domain/>",
		"XML (line 1): encoding other than UTF-8; allowed: text in UTF-8"},
	{"XML 1.1", "<?xml version='1.1'?><domain/>",
		`XML (line 1): broken XML: unsupported version "1.1"; only version 1.0 is supported` + theXML},
	{"late declaration", "\n<?xml version='1.0'?><domain/>", "XML (line 2): an XML declaration that isn't at the start" + theXML},
	{"not XML", "domain", "XML (line 1): text outside the root element" + theXML},
	{"only a comment", "<!-- -->\n", "XML (line 2): no element" + theXML},
	{"text after", "<domain/>\nx", "XML (line 2): text outside the root element" + theXML},
	{"CDATA after", "<domain/><![CDATA[ ]]>", "XML (line 1): text outside the root element" + theXML},
	{"two roots", "<domain/>\n<domain/>", "XML (line 2): a second root element; allowed: one root element"},
	{"unclosed", "<domain>\n<name>", "/domain/name (line 2): ends before </name>" + theXML},
	{"cut tag", "<domain>\n<name", "/domain (line 2): broken XML: unexpected EOF" + theXML},
	{"wrong end", "<domain>\n</name>", "/domain (line 2): closed by </name>; allowed: </domain>"},
	{"end too much", "<domain/>\n</domain>", "XML (line 2): </domain> closes nothing" + theXML},
	{"unquoted", "<domain id=1/>", "XML (line 1): broken XML: unquoted or missing attribute value in element" + theXML},
	{"entity", "<domain><name>\n&vm;</name></domain>", "/domain/name (line 2): broken XML: invalid character entity &vm;" + theXML},
	{"document type", "<!DOCTYPE domain [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]>\n<domain>&b;</domain>",
		"XML (line 1): a document type declaration; allowed: none: libvirt writes none"},
	{"colons", "<domain>\n<a:b:c/></domain>", "/domain (line 2): broken XML: expected element name after <" + theXML},
	{"colon first", "<domain>\n<:b/></domain>", `/domain/:b (line 2): element name ":b" has a misplaced colon; allowed: name or prefix:name`},
	{"attribute by two prefixes", "<domain xmlns:a='urn:a'\n xmlns:b='urn:a' a:c='1'\n b:c='2'/>",
		"/domain/@b:c (line 3): given twice, with two prefixes of one namespace; allowed: once"},
	{"undeclared attribute prefix", "<domain a:b='1'/>", `/domain/@a:b (line 1): prefix "a" isn't declared; allowed: a declared prefix`},
	{"prefix out of scope", "<domain><a xmlns:p='urn:p'/>\n<p:b/></domain>",
		`/domain/p:b (line 2): prefix "p" isn't declared; allowed: a declared prefix`},
	{"undone declaration", "<domain xmlns:a=''/>", "/domain/@xmlns:a (line 1): an empty namespace; allowed: a namespace of its own"},
	{"xmlns declared", "<domain xmlns:xmlns='urn:a'/>", "/domain/@xmlns:xmlns (line 1): xmlns can't be declared; allowed: a namespace of its own"},
	{"xml declared", "<domain xmlns:xml='urn:ftclock:domain:1'/>",
		"/domain/@xmlns:xml (line 1): prefix xml belongs to http://www.w3.org/XML/1998/namespace; allowed: a namespace of its own"},
	{"not a domain", "<network/>", "/network (line 1): not a domain; allowed: <domain> without a namespace"},
	{"domain of a namespace", "<domain xmlns='urn:a'/>", "/domain (line 1): not a domain; allowed: <domain> without a namespace"},
	{"id", "<domain id='one'/>", `/domain/@id (line 1): not an id: "one"; allowed: a whole number, 0 or more`},
	{"negative id", "<domain id='-1'/>", `/domain/@id (line 1): not an id: "-1"; allowed: a whole number, 0 or more`},
	{"huge id", "<domain id='4294967296'/>", `/domain/@id (line 1): not an id: "4294967296"; allowed: a whole number, 0 or more`},
	{"two metadata", "<domain><metadata/>\n<metadata/></domain>",
		"/domain/metadata[2] (line 2): a second metadata element; allowed: one: libvirt drops the others"},
	{"two clocks", in(clock("") + "\n" + clock("")), atClock + "[2] (line 6): a second clock element; allowed: one"},
	{"clock in domain", "<domain>\n" + clock("") + "</domain>",
		"/domain/ftclock:clock (line 2): an element of urn:ftclock:domain:1 in a wrong place; allowed: a child of /domain/metadata"},
	{"clock in devices", "<domain><devices>\n" + clock("") + "</devices></domain>",
		"/domain/devices/ftclock:clock (line 2): an element of urn:ftclock:domain:1 in a wrong place; allowed: a child of /domain/metadata"},
	{"clock in another's metadata", in("<o:o xmlns:o='urn:o'>\n" + clock("") + "</o:o>"),
		"/domain/metadata/o:o/ftclock:clock (line 4): an element of urn:ftclock:domain:1 in a wrong place; allowed: a child of /domain/metadata"},
	{"clock as root", clock(""),
		"/ftclock:clock (line 1): an element of urn:ftclock:domain:1 in a wrong place; allowed: a child of /domain/metadata"},
	{"another element of ours", in("<ftclock:timer xmlns:ftclock='urn:ftclock:domain:1'/>"),
		`/domain/metadata/ftclock:timer (line 3): unknown element; allowed: element "ftclock:clock"`},
	{"version 2 elsewhere", "<domain><f:clock xmlns:f='urn:ftclock:domain:2'/></domain>",
		`/domain/f:clock (line 1): unknown namespace "urn:ftclock:domain:2"; allowed: urn:ftclock:domain:1`},
	{"namespace in capitals", in("<f:clock xmlns:f='URN:FTClock:domain:1'/>"),
		`/domain/metadata/f:clock (line 3): unknown namespace "URN:FTClock:domain:1"; allowed: urn:ftclock:domain:1`},
	{"our prefix for another namespace", in("<ftclock:clock xmlns:ftclock='http://ftclock'/>"),
		atClock + ` (line 3): unknown namespace "http://ftclock"; allowed: urn:ftclock:domain:1`},
	{"clock without namespace", in("<clock/>"), "/domain/metadata/clock (line 3): a clock element without a namespace; allowed: " + theTag},
	{"first error wins", in(on("event='none'")) + "<", atOn + `/@event (line 4): unknown value "none"; allowed: ` + events},
	{"deep", "<domain>" + strings.Repeat("<a>", maxDepth),
		"/domain/a/a/a/a/…/a/a/a/a/a (line 1): elements nested too deep; allowed: 256 levels"},
	{"long name", "<" + strings.Repeat("é", 100000) + "/>",
		"/" + strings.Repeat("é", 30) + "… (line 1): not a domain; allowed: <domain> without a namespace"},
	{"huge", "<domain>" + strings.Repeat(" ", maxSize) + "</domain>", "XML: 16777233 bytes long; allowed: at most 16 MiB"},
}

func TestParseErrors(t *testing.T) {
	for _, tt := range badElements {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(in(tt.xml)))
			checkError(t, err, tt.err)
			if _, err := ParseElement([]byte(tt.xml)); err == nil {
				t.Error("the element alone was accepted")
			}
		})
	}
	for _, tt := range badDomains {
		t.Run(tt.name, func(t *testing.T) {
			d, err := Parse([]byte(tt.xml))
			checkError(t, err, tt.err)
			if !reflect.DeepEqual(d, Domain{}) {
				t.Errorf("a domain came with the error: %+v", d)
			}
		})
	}
}

func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted\nwant %s", want)
	}
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	if e := (*Error)(nil); !errors.As(err, &e) || strings.ContainsAny(err.Error(), "\n\r") {
		t.Errorf("not one line of *Error: %#v", err)
	}
}

func TestParseElementAlone(t *testing.T) {
	// What `virsh metadata` prints: libvirt takes the namespace off.
	p, err := ParseElement([]byte("<clock reference=\"utc\">\n  <on event=\"suspend\" do=\"catch-up\"/>\n</clock>\n\n"))
	want := policy(func(p *Policy) { p.Reference, p.Suspend.Do = UTC, CatchUp })
	if err != nil || p != want {
		t.Errorf("got %+v, %v", p, err)
	}
	for _, tt := range []struct{ xml, err string }{
		{"", "XML: empty; allowed: one XML document"},
		{"<on event='suspend'/>", "/on (line 1): not a clock element of ftclock; allowed: " + theTag},
		{"<clock offset='utc'/>", "/clock/@offset (line 1): unknown attribute; allowed: reference, slew, monitor, required"},
		{"<clock xmlns='urn:ftclock:domain:2'/>", "/clock (line 1): not a clock element of ftclock; allowed: " + theTag},
		{"<clock>\n<on event='suspend' limit='1s'/></clock>",
			`/clock/on[1]/@limit (line 2): a limit, but suspend is held however long it is; allowed: no limit, or do="catch-up"`},
		{in(clock("")), "/domain (line 1): not a clock element of ftclock; allowed: " + theTag},
	} {
		_, err := ParseElement([]byte(tt.xml))
		checkError(t, err, tt.err)
	}
}

// A document that is hostile but small enough must not take long: every lookup is by map.
func TestParseManyDeclarations(t *testing.T) {
	var b strings.Builder
	b.WriteString("<domain")
	for i := range 100_000 {
		fmt.Fprintf(&b, " xmlns:p%d='urn:p'", i)
	}
	b.WriteString(">" + strings.Repeat("<p7:a/>", 100_000) + "</domain>")
	check.Value(Parse([]byte(b.String())))(t)
}

func TestManaged(t *testing.T) {
	for xml, want := range map[string]bool{
		in(clock("")): true,
		in("<ftclock:clock xmlns:ftclock='urn:ftclock:domain:2'/>"): true, // to be refused, not ignored
		"<domain><name>ftclock</name></domain>":                     false,
		"":                                                          false,
	} {
		if Managed([]byte(xml)) != want {
			t.Errorf("managed isn't %v: %s", want, xml)
		}
	}
}
