package test

import (
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ftclock/test/check"
)

// layers are the helpers, the upper ones first, as doc.go says: each imports only helpers below it.
var layers = [][]string{
	{"domaintest", "rig", "linuxguest"},
	{"privatelibvirt"},
	{"guest", "kvmhost", "qmp", "container", "history"},
	{"kvmhost/protocol", "initramfs", "measure"},
	{"built", "check", "endings", "hang"},
}

func TestHelpersImportOnlyWhatIsBelowThem(t *testing.T) {
	layer := map[string]int{}
	for n, names := range layers {
		for _, name := range names {
			layer[name] = n
		}
	}
	for name, mine := range layer {
		files := check.Value(filepath.Glob(filepath.Join(name, "*.go")))(t)
		files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "_test.go") })
		if len(files) == 0 {
			t.Errorf("there is no package %s", name)
		}
		for _, file := range files {
			for _, spec := range check.Value(parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly))(t).Imports {
				imported, ours := strings.CutPrefix(check.Value(strconv.Unquote(spec.Path.Value))(t), "ftclock/test/")
				if theirs, helper := layer[imported]; ours && (!helper || theirs <= mine) {
					t.Errorf("%s imports %s, which isn't below it", file, imported)
				}
			}
		}
	}
}
