package metadata

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
)

var update = flag.Bool("update", false, "write testdata/golden/*.enabled and *.disabled")

const testModule = "/usr/lib/ftclock/" + Module

// goldenOptions write an element with children and touch LD_PRELOAD.
func goldenOptions() EditOptions {
	p := Default()
	p.Reference = UTC
	p.Checkpoint.Limit = 500 * time.Millisecond
	p.Suspend = Rule{CatchUp, 15 * time.Minute}
	return EditOptions{Policy: p, Preload: testModule}
}

// What Enable and Disable do to domains as they are found. *.enabled is Enable's result, *.disabled
// is what Disable makes of that; it exists only where it isn't the original.
func TestGolden(t *testing.T) {
	// Enable can't know whether what it replaced or filled was there for a reason.
	notRestored := map[string]bool{
		"empty-metadata": true, "blank-metadata": true, // an empty <metadata> goes
		"other-prefix": true, "broken-clock": true, // there was an element before
	}
	files, err := filepath.Glob("testdata/golden/*.xml")
	if err != nil || len(files) == 0 {
		t.Fatal("no golden files", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".xml")
		t.Run(name, func(t *testing.T) {
			original := read(t, file)
			o := goldenOptions()
			enabled := check.Value(Enable(original, o))(t)
			golden(t, strings.TrimSuffix(file, ".xml")+".enabled", enabled)
			d := check.Value(Parse(enabled))(t)
			if d.Policy == nil || *d.Policy != o.Policy || !d.Preload {
				t.Errorf("enabled domain reads as %+v", d)
			}

			again := check.Value(Enable(enabled, o))(t)
			same(t, "enabling twice", again, enabled)

			disabled := check.Value(Disable(enabled))(t)
			if notRestored[name] {
				golden(t, strings.TrimSuffix(file, ".xml")+".disabled", disabled)
			} else {
				same(t, "enabling and disabling", disabled, original)
			}
			if d, err := Parse(disabled); err != nil || d.Policy != nil || d.Preload {
				t.Errorf("disabled domain reads as %+v, %v", d, err)
			}
			again = check.Value(Disable(disabled))(t)
			same(t, "disabling twice", again, disabled)
		})
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		check.NoError(t, os.WriteFile(file, got, 0o644))
	}
	same(t, file, got, read(t, file))
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n got:\n%s\nwant:\n%s", what, got, want)
	}
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	b := check.Value(os.ReadFile(file))(t)
	return b
}
