package house

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	repo   = "../.."
	module = "ftclock"
)

// These pages draw layers, top first: a package imports packages of lower layers alone. The second has what tests share, by folders
// below test.
const (
	diagramPage = "docs/architecture.md"
	helpersPage = "test/README.md"
)

// longFunctions aren't short enough yet. No product function is among them.
var longFunctions = []string{
	"test/bench/agent.go agent",
	"test/bench/agent.go chrony",
	"test/bench/cont.go cont",
	"test/bench/drift.go drift",
	"test/bench/rates.go rates",
	"test/bench/start.go start",
	"test/e2e/sweep_migration_test.go migrate",
	"test/e2e/ways_to_migrate_test.go waysToMigrate",
	"test/kvmhost/init/main.go run",
	"test/kvmhost/kvmhost.go boot",
	"test/kvmhost/kvmhost.go serve",
	"test/packages/lifecycle_test.go life",
	"test/privatelibvirt/second.go StartSecond",
	"test/soak/soak.go soak",
}

// Lengths in lines. A function's is from its first line to its closing brace.
const (
	maxFile     = 600
	maxFunction = 60
)

// depths gives each package its layer, counted from the top.
func depths(text string) (map[string]int, error) {
	of := map[string]int{}
	for i, line := range strings.Split(strings.TrimSpace(text), "\n") {
		for name := range strings.FieldsSeq(line) {
			if _, twice := of[name]; twice {
				return nil, errors.New(name + " is in two layers")
			}
			of[name] = i
		}
	}
	return of, nil
}

// diagram gives the block of the page that draws the layers: a fence whose info string is "text layers".
func diagram(page string) (string, error) {
	_, rest, ok := strings.Cut(page, "\n```text layers\n")
	text, _, closed := strings.Cut(rest, "\n```")
	if !ok || !closed {
		return "", errors.New("there is no block `text layers`")
	}
	return text, nil
}

// goPackage is what `go list -json` says of a package.
type goPackage struct {
	ImportPath                string
	GoFiles, CgoFiles         []string
	Imports                   []string
	TestImports, XTestImports []string
}

// packages lists those of the module, by their folders.
func packages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,GoFiles,CgoFiles,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = repo
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal("go list: ", err)
	}
	all := map[string]goPackage{}
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module+"/")] = p
	}
}

// ours gives the folders of the module's packages among imports.
func ours(imports []string) (all []string) {
	for _, path := range imports {
		if name, ok := strings.CutPrefix(path, module+"/"); ok {
			all = append(all, name)
		}
	}
	return all
}

// part gives the package that a package is a part of: itself, but for those in an internal folder. Go sees to it that nobody else
// imports these, and that they don't import each other in a circle.
func part(name string) string {
	whole, _, _ := strings.Cut(name, "/internal/")
	return whole
}

// wrong says what is wrong with the imports of packages, by the layers' depths.
func wrong(all map[string]goPackage, depth map[string]int) (problems []string) {
	say := func(words ...string) { problems = append(problems, strings.Join(words, " ")) }
	for name, p := range all {
		if strings.HasPrefix(name, "test/") || len(p.GoFiles)+len(p.CgoFiles) == 0 {
			continue // what serves tests may import everything, and is imported by tests alone
		}
		own, known := depth[part(name)]
		if !known {
			say(name, "is in no layer")
			continue
		}
		for _, imported := range ours(p.Imports) {
			if part(imported) == part(name) {
				continue
			}
			if other, known := depth[part(imported)]; !known {
				say(name, "imports", imported+", which is in no layer")
			} else if other <= own {
				say(name, "imports", imported+", which isn't below it")
			}
		}
	}
	for name := range depth {
		if _, there := all[name]; !there {
			say(name, "is in a layer, but not there")
		}
	}
	slices.Sort(problems)
	return problems
}

// drawn gives the layers that a page draws.
func drawn(t *testing.T, page string) map[string]int {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(repo, page))
	if err != nil {
		t.Fatal(err)
	}
	text, err := diagram(string(content))
	if err != nil {
		t.Fatal(page+": ", err)
	}
	depth, err := depths(text)
	if err != nil {
		t.Fatal(page+": ", err)
	}
	return depth
}

// No package imports upwards, or what stands beside it.
func TestLayers(t *testing.T) {
	for _, problem := range wrong(packages(t), drawn(t, diagramPage)) {
		t.Error(problem)
	}
}

// Nor does a helper of tests, of what is in the folder of tests: it imports no test either.
func TestHelpersImportOnlyWhatIsBelowThem(t *testing.T) {
	all, depth, helpers := packages(t), drawn(t, helpersPage), map[string]goPackage{}
	for name := range depth {
		p, there := all["test/"+name]
		if !there {
			continue // which is wrong
		}
		var imports []string
		for _, imported := range p.Imports {
			if below, ok := strings.CutPrefix(imported, module+"/test/"); ok {
				imports = append(imports, module+"/"+below)
			}
		}
		p.Imports = imports
		helpers[name] = p
	}
	for _, problem := range wrong(helpers, depth) {
		t.Error("test: " + problem)
	}
}

// The test itself sees what is wrong.
func TestWhatIsWrongIsSeen(t *testing.T) {
	text, err := diagram("# A page\n\n```text\nx\n```\n\n```text layers\ntop\na b\nbase\n```\nmore\n")
	if err != nil {
		t.Fatal(err)
	}
	depth, err := depths(text)
	if err != nil {
		t.Fatal(err)
	}
	p := func(imports ...string) goPackage {
		all := []string{"os"}
		for _, name := range imports {
			all = append(all, module+"/"+name)
		}
		return goPackage{GoFiles: []string{"x.go"}, Imports: all}
	}
	good := map[string]goPackage{"top": p("a", "base"), "a": p("base"), "b": p(), "base": p(), "test/x": p("top"), "onlytests": {},
		"a/internal/x": p("a/internal/y", "base"), "a/internal/y": p()}
	if problems := wrong(good, depth); len(problems) > 0 {
		t.Errorf("nothing is wrong: %q", problems)
	}
	for want, change := range map[string]func(map[string]goPackage){
		"base imports a, which isn't below it":         func(all map[string]goPackage) { all["base"] = p("a") },
		"a imports b, which isn't below it":            func(all map[string]goPackage) { all["a"] = p("b") },
		"b imports test/x, which is in no layer":       func(all map[string]goPackage) { all["b"] = p("test/x") },
		"a/internal/y imports b, which isn't below it": func(all map[string]goPackage) { all["a/internal/y"] = p("b") },
		"stranger is in no layer":                      func(all map[string]goPackage) { all["stranger"] = p() },
		"b is in a layer, but not there":               func(all map[string]goPackage) { delete(all, "b") },
		"top imports stranger, which is in no layer":   func(all map[string]goPackage) { all["top"] = p("stranger") },
	} {
		all := map[string]goPackage{}
		for name, p := range good {
			all[name] = p
		}
		change(all)
		if problems := wrong(all, depth); !slices.Equal(problems, []string{want}) {
			t.Errorf("want %q, got %q", want, problems)
		}
	}
	if _, err := depths("a\nb a"); err == nil {
		t.Error("one package in two layers")
	}
	if _, err := diagram("```text\na\n```\n"); err == nil {
		t.Error("a page without the diagram")
	}
	if got := functions(t, "x.go", "package x\n\nfunc (t *T) a() {\n}\n\nfunc b() {}\n"+"func c() {"+strings.Repeat("\n", maxFunction)+"}\n"); !slices.Equal(got, []string{"x.go c"}) {
		t.Errorf("long functions: %q", got)
	}
}

// generated is the line by which a generated file is known (go help generate).
var generated = regexp.MustCompile(`(?m)^(//|/\*) Code generated .* DO NOT EDIT\.`)

// sources gives the texts of the Go and C files that people write, by their paths.
func sources(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(repo), ".", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (path == "build" || path == "bin" || strings.HasPrefix(entry.Name(), ".") && path != "."):
			return fs.SkipDir
		case entry.IsDir() || !slices.Contains([]string{".go", ".c", ".h"}, filepath.Ext(path)):
			return nil
		}
		text, err := os.ReadFile(filepath.Join(repo, path))
		if err == nil && !generated.Match(text) {
			all[path] = string(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// isTest knows the functions that hold a table of cases, which may be as long as there are cases.
var isTest = regexp.MustCompile(`^(Test|Fuzz|Benchmark)`)

// functions gives the functions of a Go file that are too long.
func functions(t *testing.T, path, text string) (long []string) {
	t.Helper()
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, path, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || strings.HasSuffix(path, "_test.go") && isTest.MatchString(fn.Name.Name) {
			continue
		}
		if files.Position(fn.End()).Line-files.Position(fn.Pos()).Line+1 > maxFunction {
			long = append(long, path+" "+fn.Name.Name)
		}
	}
	return long
}

// Nothing is too long but what is listed, and everything that is listed is.
func TestLengths(t *testing.T) {
	var files, funcs []string
	for path, text := range sources(t) {
		if strings.Count(text, "\n") > maxFile {
			files = append(files, path)
		}
		if strings.HasSuffix(path, ".go") {
			funcs = append(funcs, functions(t, path, text)...)
		}
	}
	compare := func(what string, bound int, found, listed []string) {
		slices.Sort(found)
		for _, x := range found {
			if !slices.Contains(listed, x) {
				t.Errorf("%s: this %s has more than %d lines", x, what, bound)
			}
		}
		for _, x := range listed {
			if !slices.Contains(found, x) {
				t.Errorf("%s: this %s is short enough, or gone: take it off the list", x, what)
			}
		}
	}
	compare("file", maxFile, files, nil)
	compare("function", maxFunction, funcs, longFunctions)
}
