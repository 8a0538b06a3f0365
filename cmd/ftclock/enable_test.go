package main

import (
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	metadata "ftclock/xml-templates"
)

const mockDomain = "test"

// holdMock keeps libvirt's mock alive, so that several runs in this process meet the same domains.
func holdMock(t *testing.T) (*hypervisor.Host, *hypervisor.Domain) {
	t.Helper()
	t.Setenv("LIBVIRT_DEFAULT_URI", "test:///default")
	before := status.HostDirs
	status.HostDirs.Shims = t.TempDir()
	h, err := hypervisor.Connect("")
	if err != nil {
		t.Fatal(err)
	}
	d, err := h.Find(mockDomain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Close()
		h.Close()
		status.HostDirs = before
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
		m, err := d.Parse(libvirt.DOMAIN_XML_INACTIVE)
		if err != nil {
			t.Fatal(err)
		}
		return m.Policy
	}
	const next = "test: takes effect at the next start\n"
	before, err := d.Definition(0)
	if err != nil {
		t.Fatal(err)
	}

	want := metadata.Default()
	step := func(said string, args ...string) {
		t.Helper()
		wantRun(t, "test: "+said+"\n"+next, "", 0, append([]string{"enable", mockDomain}, args...)...)
		if got := policy(); got == nil || *got != want {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
	step("enabled in its definition")
	step("enabled already, with this policy")
	want.Reference, want.Checkpoint.Limit = metadata.UTC, 250*time.Millisecond
	step("changed in its definition", "--reference", "utc", "--checkpoint-limit", "250ms")
	// What isn't given stays, also what only a person with an editor writes.
	want.Suspend = metadata.Rule{Do: metadata.CatchUp, Limit: time.Minute}
	if err := d.SetElement(&want, libvirt.DOMAIN_AFFECT_CONFIG); err != nil {
		t.Fatal(err)
	}
	want.Required = false
	step("changed in its definition", "--required", "no")
	want.Monitor = metadata.Direct
	step("changed in its definition", "--monitor", "direct")
	want.Monitor = metadata.Relayed
	step("changed in its definition", "--monitor", "relayed")
	wantRun(t, "DOMAIN  STATE    METHOD  PAUSES  LOST IN ALL  LAST RESIDUAL  WORST  SINCE\n"+
		"test    pending  -            -            -              -      -  -\n"+
		"test: enabled while it ran: its next start is corrected, `ftclock enable --live test` corrects it now\n", "", 1, "status")

	wantRun(t, "test: disabled in its definition\n", "", 0, "disable", mockDomain)
	wantRun(t, "test: no ftclock metadata in its definition\n", "", 0, "disable", mockDomain)
	after, err := d.Definition(0)
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != strings.ReplaceAll(string(after), "  <metadata/>\n", "") {
		t.Errorf("disabling left something:\n%s", after)
	}
	if !h.IsTest() {
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
