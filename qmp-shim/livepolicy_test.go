package shim

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	metadata "ftclock/xml-templates"
)

// statusText is libvirt's state of a running domain, as far as it matters here.
func statusText(uuid, inner string) string {
	if inner != "" {
		inner = "<metadata>" + inner + "</metadata>"
	}
	return "<!-- WARNING -->\n<domstatus state='running' reason='booted' pid='7'>\n  <monitor path='m' type='unix'/>\n  <job type='none'/>\n" +
		"  <domain type='kvm' id='1'><name>vm</name><uuid>" + uuid + "</uuid>" + inner + "<os/></domain>\n</domstatus>\n"
}

// A change of the running domain's metadata is taken over, and nothing else is.
func TestAChangeOfTheMetadataIsTakenOver(t *testing.T) {
	const uuid, limit = "6695eb01-f6a4-8304-79aa-97f2502e193f", `<ftclock:on event="checkpoint" limit="2s"/>`
	changedTo := strings.Replace(byDefault, "/>", ">"+limit+"</ftclock:clock>", 1)
	p, err := metadata.ParseElement([]byte(changedTo))
	if err != nil {
		t.Fatal(err)
	}
	canonical, anchor := p.XML(), `<ftclock-anchor:anchor xmlns:ftclock-anchor="urn:ftclock:anchor:1" clock="1"/>`

	dir := t.TempDir()
	s := &shim{Config: Config{UUID: uuid, Name: "vm", PIDFile: filepath.Join(dir, "vm.pid"), Log: zerolog.New(io.Discard)}}
	s.domain = domainOf(t, memory{Clock: byDefault, Metadata: byDefault}, s.Log, func(memory) {})
	policy := func() string { return clockXML(s.domain.view().policy) }
	for _, step := range []struct {
		name, file string
		want       string
		warning    string
	}{
		{"no file", "", byDefault, ""},
		{"as it was", statusText(uuid, byDefault), byDefault, ""},
		{"another element", statusText(uuid, byDefault+`<x:x xmlns:x="urn:x"/>`), byDefault, ""},
		{"an anchor", statusText(uuid, anchor+byDefault), byDefault, ""},
		{"changed", statusText(uuid, changedTo+anchor), canonical, ""},
		{"another domain's", statusText(strings.Replace(uuid, "6", "7", 1), byDefault), canonical, "another domain"},
		{"wrong", statusText(uuid, strings.Replace(changedTo, "2s", "two", 1)), canonical, `"two" has no number`},
		{"torn", statusText(uuid, byDefault)[:150], canonical, "holds no domain"},
		{"none", statusText(uuid, ""), "", ""},
		{"back", statusText(uuid, byDefault), byDefault, ""},
		{"an anchor alone", statusText(uuid, anchor), "", ""},
		{"and back", statusText(uuid, anchor+byDefault), byDefault, ""},
	} {
		if step.file != "" {
			if err := os.WriteFile(filepath.Join(dir, "vm.xml"), []byte(step.file), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s.domain.notes.change(func(m *memory) { m.Problems.Warnings = nil })
		s.lookAtMetadata(false)
		if got := policy(); got != step.want {
			t.Errorf("%s: the policy is %q, want %q", step.name, got, step.want)
		}
		if said := strings.Join(warnings(s.domain), "; "); (step.warning == "") != (said == "") || !strings.Contains(said, step.warning) {
			t.Errorf("%s: warned %q", step.name, said)
		}
	}

	// What was said on the control socket stays, as long as the metadata says what it said.
	s.domain.setPolicy(nil)
	s.lookAtMetadata(false)
	if got := policy(); got != "" {
		t.Errorf("an old element came back: %q", got)
	}
}

// A domain that started under the host's policy has no metadata of ours: that says nothing until it gets some.
func TestTheHostsPolicyStaysUntilThereIsMetadata(t *testing.T) {
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	dir := t.TempDir()
	s := &shim{Config: Config{UUID: uuid, Name: "vm", PIDFile: filepath.Join(dir, "vm.pid"), Log: zerolog.New(io.Discard),
		Clock: byDefault, Policy: "/etc/ftclock/policy.d/a.xml"}}
	s.domain = domainOf(t, s.begins(), s.Log, func(memory) {})
	watching := strings.Replace(byDefault, "/>", ` required="no"/>`, 1)
	for _, step := range []struct{ name, metadata, want string }{
		{"none", "", byDefault},
		{"somebody else's", `<x:x xmlns:x="urn:x"/>`, byDefault},
		{"its own", watching, watching},
		{"none again", "", ""}, // as with every domain whose metadata is taken away
	} {
		if err := os.WriteFile(filepath.Join(dir, "vm.xml"), []byte(statusText(uuid, step.metadata)), 0o600); err != nil {
			t.Fatal(err)
		}
		s.lookAtMetadata(false)
		if got := clockXML(s.domain.view().policy); got != step.want {
			t.Errorf("%s: the policy is %q, want %q", step.name, got, step.want)
		}
	}
}

// A file is read in memory, by calls of our own, and on a disk.
func TestFilesAreReadQuietly(t *testing.T) {
	shm, err := os.MkdirTemp("/dev/shm", "ftclock-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(shm)
	for _, dir := range []string{shm, t.TempDir()} {
		path := filepath.Join(dir, "file")
		for _, size := range []int{0, 1, 4095, 4096, 4097, 100_000} {
			want := strings.Repeat("x", size)
			if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := readQuietly([]byte("before"), path, size+6); err != nil || string(got) != "before"+want {
				t.Errorf("%s, %d bytes: %d came: %v", dir, size, len(got), err)
			}
			if _, err := readQuietly(nil, path, size-1); (err == nil) != (size == 0) || err != nil && !strings.Contains(err.Error(), "has more than") {
				t.Errorf("%s, %d bytes, too many: %v", dir, size, err)
			}
		}
		if _, err := readQuietly(nil, path+"-none", 1); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if _, err := statQuietly(path + "-none"); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if _, err := readQuietly(nil, dir, 1); !errors.Is(err, unix.EISDIR) {
			t.Error(err)
		}
		before, err := statQuietly(path)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := statQuietly(path); err != nil || !sameFile(&before, &again) {
			t.Errorf("the same file: %v", err)
		}
		if err := errors.Join(os.WriteFile(path+"-new", make([]byte, 100_000), 0o600), os.Rename(path+"-new", path)); err != nil {
			t.Fatal(err)
		}
		if after, err := statQuietly(path); err != nil || sameFile(&before, &after) {
			t.Errorf("another file of the same size: %v", err)
		}
	}
}
