package metadata

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/host"
)

func FuzzParse(f *testing.F) {
	for _, tt := range goodElements {
		f.Add([]byte(in(tt.xml)))
	}
	for _, tt := range badElements {
		if len(tt.xml) < 1000 {
			f.Add([]byte(in(tt.xml)))
			f.Add([]byte(tt.xml))
		}
	}
	for _, tt := range badDomains {
		if len(tt.xml) < 5000 {
			f.Add([]byte(tt.xml))
		}
	}
	f.Fuzz(func(t *testing.T, xml []byte) {
		d, err := Parse(xml)
		checkFuzzError(t, err)
		if err == nil && d.Policy != nil {
			// The hook looks for the text that libvirt writes, without character references.
			if !Managed(xml) && !strings.Contains(string(xml), "&") {
				t.Error("managed, but doesn't look so")
			}
			if p, err := ParseElement([]byte(d.Policy.XML())); err != nil || p != *d.Policy {
				t.Errorf("%+v became %+v, %v", *d.Policy, p, err)
			}
		}
		p, err := ParseElement(xml)
		checkFuzzError(t, err)
		if err == nil {
			if again, err := ParseElement([]byte(p.XML())); err != nil || again != p {
				t.Errorf("%+v became %+v, %v", p, again, err)
			}
		}
	})
}

func checkFuzzError(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	var e *Error
	if !errors.As(err, &e) || e.Reason == "" || e.Allowed == "" || e.Line < 0 {
		t.Errorf("not a whole error: %#v", err)
	}
	if s := err.Error(); host.Printable(s) != s || len(s) > 2000 {
		t.Errorf("not one short line: %q", s)
	}
}

func FuzzEdit(f *testing.F) {
	files, err := filepath.Glob("testdata/golden/*.xml")
	if err != nil {
		f.Fatal(err)
	}
	for i, file := range files {
		f.Add(read(f, file), uint64(i), i%2 == 0)
	}
	f.Fuzz(func(t *testing.T, xml []byte, seed uint64, preload bool) {
		o := EditOptions{Policy: randomPolicy(rand.New(rand.NewPCG(seed, seed)))}
		if preload {
			o.Preload = testModule
		}
		checkEdits(t, xml, o)
	})
}
