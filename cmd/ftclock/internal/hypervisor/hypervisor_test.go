package hypervisor

import (
	"strings"
	"testing"
	"time"

	metadata "ftclock/xml-templates"
)

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
		if err := CheckURI(test.uri); (err == nil) != test.supported {
			t.Errorf("CheckURI(%q): %v", test.uri, err)
		}
		if got := isLocal(test.uri); got != test.local {
			t.Errorf("isLocal(%q): %t", test.uri, got)
		}
	}
}
