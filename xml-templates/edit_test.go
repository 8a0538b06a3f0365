package metadata

import (
	"math/rand/v2"
	"strings"
	"testing"

	"ftclock/test/check"
)

func TestEnableWithoutPreload(t *testing.T) {
	const before = "<domain>\n  <name>a</name>\n  <metadata>\n    <o:o xmlns:o='urn:o'/>\n  </metadata>\n</domain>\n"
	const after = "<domain>\n  <name>a</name>\n  <metadata>\n    <o:o xmlns:o='urn:o'/>\n" +
		"    <ftclock:clock xmlns:ftclock=\"urn:ftclock:domain:1\"/>\n  </metadata>\n</domain>\n"
	got := check.Value(Enable([]byte(before), EditOptions{Policy: Default()}))(t)
	same(t, "enabled", got, []byte(after))
}

// An element that says the same in other words is somebody's own: it stays as it was written.
func TestEnableKeepsSameMeaning(t *testing.T) {
	xml := in("<c:clock required='yes' xmlns:c='urn:ftclock:domain:1'><!-- why --><c:on event='suspend' do='hold'/></c:clock>")
	got := check.Value(Enable([]byte(xml), EditOptions{Policy: Default()}))(t)
	same(t, "enabled", got, []byte(xml))
}

func TestPreload(t *testing.T) {
	const own = testModule
	domain := func(envs string) string {
		return "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n  <name>a</name>\n" +
			"  <metadata>" + Default().XML() + "<o xmlns='urn:o'/></metadata>\n" +
			"  <qemu:commandline>\n    <qemu:arg value='-S'/>\n" + envs + "  </qemu:commandline>\n</domain>\n"
	}
	value := func(v string) string { return "    <qemu:env name='LD_PRELOAD' value='" + v + "'/>\n" }
	for _, tt := range []struct{ name, before, enabled, disabled string }{
		{"none", "", value(own), ""},
		{"ours", value(own), value(own), ""},
		{"empty", value(""), value(own), ""},
		{"no value", "    <qemu:env name='LD_PRELOAD'/>\n", value(own), ""},
		{"another", value("/a.so"), value("/a.so:" + own), value("/a.so")},
		{"ours from elsewhere", value("/a.so /opt/" + Module + " /b.so"), value("/a.so " + own + " /b.so"), value("/a.so /b.so")},
		{"ours first", value(own + ":/b.so: /c.so"), value(own + ":/b.so: /c.so"), value("/b.so: /c.so")},
		{"ours twice", value("/opt/" + Module + ":/b.so:" + own), value(own + ":/b.so"), value("/b.so")},
		{"ours and separators", value(" " + own + ":"), value(" " + own + ":"), ""},
		{"escaped", value("/a&amp;b.so&#58;/c&apos;&lt;.so"), value("/a&amp;b.so:/c&apos;&lt;.so:" + own), value("/a&amp;b.so:/c&apos;&lt;.so")},
		{"two variables", value(own) + value("/a.so"), value(own) + value("/a.so:"+own), value("/a.so")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			enabled := check.Value(Enable([]byte(domain(tt.before)), EditOptions{Policy: Default(), Preload: own}))(t)
			same(t, "enabled", enabled, []byte(domain(tt.enabled)))
			disabled := check.Value(Disable(enabled))(t)
			want := strings.Replace(domain(tt.disabled), Default().XML(), "", 1)
			same(t, "disabled", disabled, []byte(want))
		})
	}
}

// What somebody else keeps under the prefix qemu keeps its declaration.
func TestDisableKeepsNamespaceInUse(t *testing.T) {
	const rest = "<qemu:capabilities/></domain>"
	const head = "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>a</name>"
	got, err := Disable([]byte(head + "<qemu:commandline><qemu:env name='LD_PRELOAD' value='" + testModule +
		"'/></qemu:commandline>" + rest))
	if err != nil {
		t.Fatal(err)
	}
	same(t, "disabled", got, []byte(head+rest))
}

// A line goes with the element only when nothing else stands on it.
func TestDisableLines(t *testing.T) {
	for _, tt := range []struct{ before, after string }{
		{"\n  <o/>\n  " + clock("") + "\n", "\n  <o/>\n"},
		{"\n  <o/>\n  " + clock("") + " \t\n", "\n  <o/> \t\n"},
		{"\n  " + clock("") + "<o/>\n", "\n  <o/>\n"},
		{"\n  " + clock("") + " <!-- -->\n", "\n   <!-- -->\n"},
		{"\n  <o/>" + clock("") + "\n", "\n  <o/>\n"},
		{"\n  <o/>\n  " + clock(""), "\n  <o/>"},
		{"\n\n\t<o/>\n\n\t" + clock("") + "\n\n", "\n\n\t<o/>\n\n\n"},
	} {
		got := check.Value(Disable([]byte("<domain><metadata>" + tt.before + "</metadata></domain>")))(t)
		same(t, "disabled", got, []byte("<domain><metadata>"+tt.after+"</metadata></domain>"))
	}
}

func TestEnableErrors(t *testing.T) {
	const path = ": want an absolute path to libftclock-qemu.so, without spaces, colons and quotes"
	const domain = "<domain><name>a</name></domain>"
	for _, tt := range []struct{ xml, preload, err string }{
		{domain, Module, `preloading "libftclock-qemu.so"` + path},
		{domain, "/usr/lib/other.so", `preloading "/usr/lib/other.so"` + path},
		{domain, "/my lib/" + Module, `preloading "/my lib/libftclock-qemu.so"` + path},
		{domain, "/a:b/" + Module, `preloading "/a:b/libftclock-qemu.so"` + path},
		{domain, "/a'b/" + Module, `preloading "/a'b/libftclock-qemu.so"` + path},
		{domain, "/a\x00b/" + Module, `preloading "/a\x00b/libftclock-qemu.so"` + path},
		{"<domain/>", "", "/domain: no name; allowed: a domain with a <name>"},
		{"<domain>", "", "/domain (line 1): ends before </domain>" + theXML},
		{in(clock("")) + clock(""), "", "XML (line 8): a second root element; allowed: one root element"},
		{"<domain><name>a</name>" + strings.Repeat(" ", maxSize-31) + "</domain>", "",
			"checking edited domain: XML: 16777290 bytes long; allowed: at most 16 MiB"},
	} {
		_, err := Enable([]byte(tt.xml), EditOptions{Policy: Default(), Preload: tt.preload})
		if err == nil || err.Error() != tt.err {
			t.Errorf("got  %v\nwant %s", err, tt.err)
		}
	}
}

// Any policy over any other, in a domain as libvirt writes it: as if the first had never been there.
func TestEnableReplaces(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	original := read(t, "testdata/golden/nova.xml")
	for range 300 {
		a, b := EditOptions{Policy: randomPolicy(r), Preload: "/a/" + Module}, EditOptions{Policy: randomPolicy(r), Preload: testModule}
		checkEdits(t, original, a)
		first := check.Value(Enable(original, a))(t)
		over := check.Value(Enable(first, b))(t)
		direct := check.Value(Enable(original, b))(t)
		same(t, "enabling over another policy", over, direct)
	}
}

// checkEdits holds for every document, and tells whether it could be edited at all.
func checkEdits(t *testing.T, xml []byte, o EditOptions) bool {
	t.Helper()
	if disabled, err := Disable(xml); err == nil {
		checkDisabled(t, disabled)
	}
	enabled, err := Enable(xml, o)
	if err != nil {
		return false
	}
	d, err := Parse(enabled)
	if err != nil || d.Policy == nil || *d.Policy != o.Policy || o.Preload != "" && !d.Preload {
		t.Fatalf("enabled domain reads as %+v, %v:\n%q", d, err, enabled)
	}
	again := check.Value(Enable(enabled, o))(t)
	same(t, "enabling twice", again, enabled)
	disabled := check.Value(Disable(enabled))(t)
	checkDisabled(t, disabled)
	if restorable(xml) {
		same(t, "enabling and disabling", disabled, xml)
	}
	return true
}

func checkDisabled(t *testing.T, disabled []byte) {
	t.Helper()
	if d, err := Parse(disabled); err != nil || d.Policy != nil || d.Preload {
		t.Fatalf("disabled domain reads as %+v, %v:\n%q", d, err, disabled)
	}
	again := check.Value(Disable(disabled))(t)
	same(t, "disabling twice", again, disabled)
}

// restorable tells whether Disable can know what Enable found: nothing of ours was there, and
// nothing empty that looks as if we had left it.
func restorable(xml []byte) bool {
	d, err := readDocument(xml)
	if err != nil || d.clock != nil || len(d.preloads) > 0 {
		return false
	}
	for i := range d.root.attrs {
		if d.root.attrs[i].value == qemuNamespace && d.prefixUses == 0 {
			return false // declared but not used
		}
	}
	return (d.metadata == nil || !d.emptyWithout(d.metadata)) && (d.commandline == nil || !d.emptyWithout(d.commandline))
}
