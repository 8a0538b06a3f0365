package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/xml-templates"
)

const mockDomain = "test"

// holdMock keeps libvirt's mock alive, so that several runs in this process meet the same domains.
func holdMock(t *testing.T) (*host, *domain) {
	t.Helper()
	t.Setenv("LIBVIRT_DEFAULT_URI", "test:///default")
	before := shims
	shims = t.TempDir()
	h, err := connect("")
	if err != nil {
		t.Fatal(err)
	}
	d, err := h.find(mockDomain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.free()
		h.close()
		shims = before
	})
	return h, d
}

func wantRun(t *testing.T, wantOut, wantErr string, wantCode int, args ...string) {
	t.Helper()
	stdout, stderr, code := told(args...)
	if stdout != wantOut || !strings.Contains(stderr, wantErr) || wantErr == "" && stderr != "" || code != wantCode {
		t.Errorf("%q: exit code %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q", args, code, wantCode, stdout, wantOut, stderr, wantErr)
	}
}

func TestEnableAndDisable(t *testing.T) {
	h, d := holdMock(t)
	policy := func() *metadata.Policy {
		t.Helper()
		m, err := d.parse(libvirt.DOMAIN_XML_INACTIVE)
		if err != nil {
			t.Fatal(err)
		}
		return m.Policy
	}
	const next = "test: takes effect at the next start\n"
	before, err := d.definition(0)
	if err != nil {
		t.Fatal(err)
	}

	wantRun(t, "test: enabled in its definition\n"+next, "", 0, "enable", mockDomain)
	want := metadata.Default()
	if got := policy(); got == nil || *got != want {
		t.Fatalf("got %+v, want the default", got)
	}
	wantRun(t, "test: enabled already, with this policy\n"+next, "", 0, "enable", mockDomain)

	wantRun(t, "test: changed in its definition\n"+next, "", 0,
		"enable", mockDomain, "--reference", "utc", "--checkpoint-limit", "250ms")
	want.Reference, want.Checkpoint.Limit = metadata.UTC, 250*time.Millisecond
	if got := policy(); got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	// What isn't given stays, also what only a person with an editor writes.
	want.Suspend = metadata.Rule{Do: metadata.CatchUp, Limit: time.Minute}
	if err := d.setElement(&want, libvirt.DOMAIN_AFFECT_CONFIG); err != nil {
		t.Fatal(err)
	}
	wantRun(t, "test: changed in its definition\n"+next, "", 0, "enable", mockDomain, "--required", "no")
	want.Required = false
	if got := policy(); got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	wantRun(t, "test: changed in its definition\n"+next, "", 0, "enable", mockDomain, "--monitor", "direct")
	want.Monitor = metadata.Direct
	if got := policy(); got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	wantRun(t, "test: changed in its definition\n"+next, "", 0, "enable", mockDomain, "--monitor", "relayed")
	want.Monitor = metadata.Relayed
	if got := policy(); got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	wantRun(t, "DOMAIN  STATE    METHOD  PAUSES  LOST IN ALL  LAST RESIDUAL  WORST  SINCE\n"+
		"test    pending  -            -            -              -      -  -\n"+
		"test: enabled while it ran: its next start is corrected, `ftclock enable --live test` doesn't wait\n", "", 1, "status")

	wantRun(t, "test: disabled in its definition\n", "", 0, "disable", mockDomain)
	wantRun(t, "test: nothing of ftclock in its definition\n", "", 0, "disable", mockDomain)
	after, err := d.definition(0)
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != strings.ReplaceAll(string(after), "  <metadata/>\n", "") {
		t.Errorf("disabling left something:\n%s", after)
	}
	if !h.isTest() {
		t.Fatal("this wasn't libvirt's mock")
	}
}

// Other people's metadata stays.
func TestOthersMetadata(t *testing.T) {
	_, d := holdMock(t)
	const others = "urn:somebody:else"
	if err := d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, "<clock/>", "ftc", others, libvirt.DOMAIN_AFFECT_CONFIG); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"enable", "disable"} {
		if _, stderr, code := told(command, mockDomain); code != 0 {
			t.Fatal(stderr)
		}
		if _, err := d.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, others, libvirt.DOMAIN_AFFECT_CONFIG); err != nil {
			t.Errorf("after %s: %v", command, err)
		}
	}
}

func TestBare(t *testing.T) {
	policies := []metadata.Policy{metadata.Default(), {
		Reference:  metadata.UTC,
		Checkpoint: metadata.Rule{Limit: time.Second},
		Suspend:    metadata.Rule{Limit: time.Minute},
		Migrate:    metadata.Rule{Do: metadata.Hold},
	}}
	for _, want := range policies {
		text := bare(want.XML())
		if strings.Contains(text, metadata.Prefix) {
			t.Errorf("prefix or namespace left: %s", text)
		}
		if got, err := metadata.ParseElement([]byte(text)); err != nil || got != want {
			t.Errorf("%s: got %+v (%v), want %+v", text, got, err, want)
		}
	}
}

func TestURIs(t *testing.T) {
	for _, test := range []struct {
		uri              string
		supported, local bool
	}{
		{"qemu:///system", true, true},
		{"qemu+unix:///system", true, true},
		{"qemu+unix:///system?socket=/run/x", true, true},
		{"qemu:///session", false, false},
		{"qemu+unix:///session", false, false},
		{"qemu+ssh://root@far/system", true, false},
		{"qemu+tls://far/system", true, false},
		{"qemu://far/system", true, false},
		{"qemu+ssh://far/session", false, false},
		{"qemu:///embed?root=/x", false, false},
		{"test:///default", true, false},
		{"", true, false},
		{"an alias", true, false},
		{"%zz", true, false},
	} {
		if err := checkURI(test.uri); (err == nil) != test.supported {
			t.Errorf("checkURI(%q): %v", test.uri, err)
		}
		if got := isLocal(test.uri); got != test.local {
			t.Errorf("isLocal(%q): %t", test.uri, got)
		}
	}
}

func TestSayError(t *testing.T) {
	lv := libvirt.Error{Code: libvirt.ERR_NO_DOMAIN, Message: "Domain not found: 'x'\n"}
	other := libvirt.Error{Code: libvirt.ERR_AUTH_FAILED, Message: "access ('denied')"}
	for _, test := range []struct {
		err  error
		want string
	}{
		{errors.New("plain"), "plain"},
		{lv, "Domain not found: 'x'"},
		{fmt.Errorf("looking: %w", lv), "looking: Domain not found: 'x'"},
		{hinted(errors.Join(fmt.Errorf("one: %w", lv), fmt.Errorf("two: %w", other)), "h"), "one: Domain not found: 'x'; two: access ('denied')"},
		{errors.New("a\x1b[31m\nb"), "a [31m; b"},
	} {
		if got := sayError(test.err); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

func TestShellWord(t *testing.T) {
	for word, want := range map[string]string{"web-1.example": "web-1.example", "": "''", "two words": "'two words'", "it's": `'it'\''s'`, "$(x)": "'$(x)'"} {
		if got := shellWord(word); got != want {
			t.Errorf("%q: got %s, want %s", word, got, want)
		}
	}
}

func TestIsUUID(t *testing.T) {
	for s, want := range map[string]bool{
		"6695eb01-f6a4-8304-79aa-97f2502e193f": true, "6695EB01F6A4830479AA97F2502E193F": true, "": false, "test": false,
		"6695eb01-f6a4-8304-79aa-97f2502e193": false, "6695eb01-f6a4-8304-79aa-97f2502e193g": false,
	} {
		if got := isUUID(s); got != want {
			t.Errorf("%q: %t", s, got)
		}
	}
}
