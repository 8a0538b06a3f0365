package packaging

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The example is a playbook, and each variable of the role has a default, a type and a line in the page. TestKVMAnsible, in
// test/wholehost, runs the role.
func TestAnsibleRole(t *testing.T) {
	ansible := need(t, "ansible-playbook", "ansible-core")
	run(t, "ansible", []string{"LC_ALL=C.UTF-8", "ANSIBLE_LOCAL_TEMP=" + t.TempDir()}, ansible, "-i", "localhost,", "--syntax-check", "example.yml")

	variables := func(file, pattern string) (all []string) {
		text, err := os.ReadFile(filepath.Join("ansible", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?m)`+pattern).FindAllStringSubmatch(string(text), -1) {
			all = append(all, found[1])
		}
		slices.Sort(all)
		return all
	}
	want := variables("roles/ftclock/defaults/main.yml", `^(\w+):`)
	if len(want) < 5 {
		t.Fatalf("the role has only the variables %q", want)
	}
	for what, got := range map[string][]string{
		"the role's specification": variables("roles/ftclock/meta/argument_specs.yml", `^      (\w+):`),
		"the page's table":         variables("README.md", "^\\| `(ftclock_\\w+)` \\|"),
	} {
		if !slices.Equal(got, want) {
			t.Errorf("%s has %s, want %s", what, strings.Join(got, " "), strings.Join(want, " "))
		}
	}
}
