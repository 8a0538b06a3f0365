// Package pages checks the documentation's pages without running anything: links, the index, the messages that the
// troubleshooting page explains. Package docs runs the pages' commands.
package pages

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const repo = "../.."

var notInFragments = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)

// fragments are what a link to a heading of this page may end with, as GitHub makes it.
func fragments(page string) map[string]bool {
	all := map[string]bool{}
	for _, found := range regexp.MustCompile("(?m)^#+ (.+)$").FindAllStringSubmatch(page, -1) {
		all["#"+strings.ReplaceAll(notInFragments.ReplaceAllString(strings.ToLower(found[1]), ""), " ", "-")] = true
	}
	return all
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repo, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// glob gives the files of the repository that match.
func glob(t *testing.T, pattern string) (all []string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(repo, pattern))
	if err != nil || len(found) < 3 {
		t.Fatalf("%s: %d files, %v", pattern, len(found), err)
	}
	for _, file := range found {
		all = append(all, strings.TrimPrefix(file, repo+"/"))
	}
	return all
}

// Links between the pages lead somewhere, down to the heading.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, page := range append(glob(t, "*.md"), glob(t, "*/*.md")...) {
		for _, found := range link.FindAllStringSubmatch(read(t, page), -1) {
			target := filepath.Join(filepath.Dir(page), found[1])
			if _, err := os.Stat(filepath.Join(repo, target)); err != nil {
				t.Errorf("%s: %v", page, err)
			} else if found[2] != "" && !fragments(read(t, target))[found[2]] {
				t.Errorf("%s: %s has no heading for %s", page, target, found[2])
			}
		}
	}
}

// The index and the packages have every page.
func TestEveryPageIsThere(t *testing.T) {
	index, packages := read(t, "docs/README.md"), read(t, "packaging/nfpm.yaml")
	for _, page := range glob(t, "docs/*.md") {
		name := filepath.Base(page)
		if name != "README.md" && !strings.Contains(index, "]("+name+")") {
			t.Errorf("the index has no %s", name)
		}
		if !strings.Contains(packages, "dst: /usr/share/doc/ftclock/"+name+",") {
			t.Errorf("packaging/nfpm.yaml has no %s", name)
		}
	}
}

// literals are the strings in the Go code of these directories, but for tests.
func literals(t *testing.T, dirs ...string) (all []string) {
	t.Helper()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(repo, dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no code in %s: %v", dir, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(parsed, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if text, err := strconv.Unquote(lit.Value); err == nil {
						all = append(all, text)
					}
				}
				return true
			})
		}
	}
	return all
}

var verb = regexp.MustCompile(`%[-+# 0-9.]*(\[\d+\])?[a-zA-Z]`)

// The troubleshooting page's headings are messages that the programs have, and it has all that the loader and the starting of a
// shim can end with.
func TestTroubleshooting(t *testing.T) {
	page := read(t, "docs/troubleshooting.md")
	known := literals(t, "hooks", "spawn", "unit", "disk", "relay", "qmp-shim", "attach", "control", "record", "node", "cmd/ftclock",
		"cmd/ftclock/internal/doctor", "cmd/ftclock/internal/engine", "cmd/ftclock/internal/fleet", "cmd/ftclock/internal/hypervisor", "cmd/ftclock/internal/live", "cmd/ftclock/internal/status")
	var headings []string
	for _, found := range regexp.MustCompile("(?m)^### `(.+)`$").FindAllStringSubmatch(page, -1) {
		headings = append(headings, found[1])
	}
	if len(headings) < 30 {
		t.Fatalf("%d headings", len(headings))
	}
	// What stands between the places for names has to be in one message, in that order.
	in := func(heading, message string) bool {
		message = verb.ReplaceAllString(message, "…")
		for part := range strings.SplitSeq(heading, "…") {
			part = strings.Trim(part, ` "`)
			_, rest, found := strings.Cut(message, part)
			if !found {
				return false
			}
			message = rest
		}
		return true
	}
	for _, heading := range headings {
		if !slices.ContainsFunc(known, func(message string) bool { return in(heading, message) }) {
			t.Errorf("no program says %q", heading)
		}
	}
	sentinels := regexp.MustCompile(`Err[A-Z]\w+\s+= errors\.New\("([^"]+)"\)`).FindAllSubmatch(source(t, "attach"), -1)
	if len(sentinels) < 5 {
		t.Fatalf("%d errors of the loader", len(sentinels))
	}
	for _, found := range sentinels {
		if !slices.Contains(headings, string(found[1])) {
			t.Errorf("the page has no %q", found[1])
		}
	}
}

func source(t *testing.T, dir string) (all []byte) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(repo, dir, "*.go"))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
	}
	return all
}
