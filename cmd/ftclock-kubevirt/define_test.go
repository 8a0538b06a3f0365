package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	metadata "ftclock/xml-templates"
)

// domain is one as virt-launcher makes it, shortened: the metadata after the devices, attributes in double quotes, no empty elements.
const domain = `<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
	<name>shop_db-1</name>
	<memory unit="b">1073741824</memory>
	<os>
		<type arch="x86_64" machine="q35">hvm</type>
		<smbios mode="sysinfo"></smbios>
	</os>
	<sysinfo type="smbios">
		<system>
			<entry name="uuid">5a9fc181-957e-5c32-9e5a-2de5e9673531</entry>
			<entry name="product">None &amp; &lt;none&gt;</entry>
		</system>
	</sysinfo>
	<devices>
		<interface type="ethernet">
			<target dev="tap0" managed="no"></target>
			<alias name="ua-default"></alias>
		</interface>
	</devices>
	<clock offset="utc"></clock>
	<metadata>
		<kubevirt xmlns="http://kubevirt.io">
			<uid></uid>
			<graceperiod>
				<deletionGracePeriodSeconds>30</deletionGracePeriodSeconds>
			</graceperiod>
		</kubevirt>
	</metadata>
	<features>
		<acpi></acpi>
	</features>
	<cpu mode="host-model"></cpu>
	<vcpu placement="static">2</vcpu>
</domain>`

const atTheEnd = "\t\t</kubevirt>\n"

// of is a VMI with annotations: names and values.
func of(t *testing.T, pairs ...string) string {
	t.Helper()
	all := map[string]string{"hooks.kubevirt.io/hookSidecars": "[]", "example.com/ftclock.io": "x"}
	for i := 0; i < len(pairs); i += 2 {
		all[pairs[i]] = pairs[i+1]
	}
	text, err := json.Marshal(map[string]any{"kind": "VirtualMachineInstance", "metadata": map[string]any{"name": "db-1", "namespace": "shop", "annotations": all},
		"spec": map[string]any{"domain": map[string]any{}}})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// with is the domain with this in its metadata, and nothing else changed.
func with(element string) string {
	return strings.Replace(domain, atTheEnd, atTheEnd+"\t\t"+element+"\n", 1)
}

func TestAnnotations(t *testing.T) {
	const (
		clock   = "ftclock.io/clock"
		onError = "ftclock.io/on-error"
		element = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"`
		starts  = "; it starts with an uncorrected clock; fix: correct the annotation, and restart the VM\n"
		refused = "; it doesn't start, as ftclock.io/on-error says\n"
		written = "ftclock: the domain has the metadata that ftclock.io/clock asks for\n"
		unknown = `ftclock: VMI shop/db-1: annotation ftclock.io/clock: unknown value "yes"; allowed: on, off, or an element such as <clock reference="utc"/>`
		limit   = `ftclock: VMI shop/db-1: annotation ftclock.io/clock: /clock/on[1]/@limit (line 1): "20m" is too long; allowed: 1ms to 15m, a number and its unit (ms, s, m or min), such as "250ms" or "1.5s"`
	)
	for _, c := range []struct {
		name, vmi, want, said string
		code                  int
	}{
		{"no annotations of ours", of(t), domain, "", 0},
		{"off", of(t, clock, "off", onError, "refuse"), domain, "", 0},
		{"on", of(t, clock, "on"), with(element + "/>"), written, 0},
		{"on, in a block of YAML", of(t, clock, "on\n"), with(element + "/>"), written, 0},
		{"an element", of(t, clock, `<clock required="no" reference="utc"/>`), with(element + ` reference="utc" required="no"/>`), written, 0},
		{"an element with children", of(t, clock, "<f:clock xmlns:f='urn:ftclock:domain:1'>\n<f:on event='suspend' do='catch-up' limit='5m'/></f:clock>\n"),
			with(element + ">\n\t\t\t<ftclock:on event=\"suspend\" do=\"catch-up\" limit=\"5m\"/>\n\t\t</ftclock:clock>"), written, 0},
		{"an unknown value", of(t, clock, "yes"), domain, unknown + starts, 0},
		{"an unknown value, refused", of(t, clock, "yes", onError, "refuse"), "", unknown + refused, 1},
		{"an unknown value, started", of(t, clock, "yes", onError, "start"), domain, unknown + starts, 0},
		{"nothing", of(t, clock, ""), domain, strings.Replace(unknown, `"yes"`, `""`, 1) + starts, 0},
		{"a wrong element", of(t, clock, `<clock><on event="suspend" do="catch-up" limit="20m"/></clock>`), domain, limit + starts, 0},
		{"a wrong element, refused", of(t, clock, `<clock><on event="suspend" do="catch-up" limit="20m"/></clock>`, onError, "refuse"), "", limit + refused, 1},
		{"another element", of(t, clock, "<domain/>"), domain, `ftclock: VMI shop/db-1: annotation ftclock.io/clock: /domain (line 1): not a clock element of ftclock; ` +
			`allowed: <ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">` + starts, 0},
		{"a misspelled annotation", of(t, "ftclock.io/Clock", "on", clock, "on"), domain,
			`ftclock: VMI shop/db-1: unknown annotation "ftclock.io/Clock"; allowed: ftclock.io/clock, ftclock.io/on-error` + starts, 0},
		{"an unknown way with errors", of(t, clock, "on", onError, "stop"), domain,
			`ftclock: VMI shop/db-1: annotation ftclock.io/on-error: unknown value "stop"; allowed: start, refuse` + starts, 0},
		{"a line that tries to be two", of(t, clock, "a\nftclock: b"), domain, strings.Replace(unknown, `"yes"`, `"a\nftclock: b"`, 1) + starts, 0},
		{"no VMI", "", domain, "ftclock: reading the VMI: unexpected end of JSON input" + starts, 0},
		{"no VMI's JSON", `{"metadata":[]}`, domain, "", 0},
	} {
		var out, said bytes.Buffer
		code := run([]string{"--vmi", c.vmi, "--domain", domain}, &out, &said)
		if code != c.code || out.String() != c.want || c.said != "" && said.String() != c.said {
			t.Errorf("%s: ends with %d, says %q, want %d, %q; prints\n%s", c.name, code, said.String(), c.code, c.said, out.String())
		}
		if strings.Count(said.String(), "\n") > 1 {
			t.Errorf("%s: more than a line: %q", c.name, said.String())
		}
	}
}

// What is written is what the hook, or the node, reads.
func TestTheMetadataIsRead(t *testing.T) {
	var out, said bytes.Buffer
	if code := run([]string{"--vmi", of(t, clockAnnotation, `<clock slew="50ppm" reference="utc"/>`), "--domain", domain}, &out, &said); code != 0 {
		t.Fatal(code, said.String())
	}
	d, err := metadata.Parse(out.Bytes())
	if err != nil || d.Policy == nil || d.Policy.Reference != metadata.UTC || d.Policy.Slew != 50 || d.Name != "shop_db-1" {
		t.Errorf("%+v, %v", d, err)
	}
}

// A domain that isn't one is given back: libvirt says what is wrong with it.
func TestABrokenDomain(t *testing.T) {
	for _, broken := range []string{"<domain>", "<network/>", "x"} {
		var out, said bytes.Buffer
		code := run([]string{"--vmi", of(t, clockAnnotation, "on"), "--domain", broken}, &out, &said)
		if code != 0 || out.String() != broken || !strings.Contains(said.String(), "writing the metadata: ") {
			t.Errorf("%q: %d, %q, %q", broken, code, out.String(), said.String())
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"--vmi", "{}"}, {"--domain", domain, "more"}, {"--cloud-init", "{}"}} {
		var out, said bytes.Buffer
		if code := run(args, &out, &said); code != 1 || out.Len() > 0 || said.Len() == 0 {
			t.Errorf("%q: %d, %q, %q", args, code, out.String(), said.String())
		}
	}
	var said bytes.Buffer
	if code := run([]string{"--vmi", of(t), "--domain", domain}, failing{}, &said); code != 1 || !strings.Contains(said.String(), "printing the domain: full") {
		t.Errorf("a full disk: %d, %q", code, said.String())
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("full") }
