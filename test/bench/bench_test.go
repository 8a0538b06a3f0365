package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"
)

func TestMain(m *testing.M) {
	// As from `make bench`: the program is run in the root of the repository. This comes three times, see Main.
	if _, err := os.Stat("bench_test.go"); err == nil {
		if err := os.Chdir("../.."); err != nil {
			panic(err)
		}
	}
	os.Exit(privatelibvirt.Main(m.Run, privatelibvirt.Installed(".")))
}

// The quick form of all of it: whatever a row claims of a clock is checked by the program itself, times are nobody's business.
func TestKVMBenchQuick(t *testing.T) {
	if why := missing(); why != "" {
		privatelibvirt.LeaveOut(t, why)
	}
	page, pictures := filepath.Join(t.TempDir(), "page.md"), t.TempDir()
	empty := "# A page\n"
	for _, s := range sections {
		begin, end := measure.Marks(s.name)
		empty += begin + "old\n" + end + "between\n"
	}
	check.NoError(t, os.WriteFile(page, []byte(empty), 0o644))
	if err := run(options{quick: true, page: page, pictures: pictures}, t.Output(), t.Output()); err != nil {
		t.Error(err)
	}
	text := check.Value(os.ReadFile(page))(t)
	t.Logf("%s", text)
	if strings.Contains(string(text), "old") || strings.Count(string(text), "between\n") != len(sections) {
		t.Error("what isn't the benchmark's was changed, or what is its own wasn't")
	}
	for _, s := range sections {
		_, body, ok := strings.Cut(string(text), "\n## "+s.title+"\n")
		body, _, _ = strings.Cut(body, "between")
		if !ok || !strings.Contains(body, "| --- |") && !strings.Contains(body, "Not measured in this run: ") {
			t.Errorf("%s has neither a table nor a reason: %q", s.title, body)
		}
	}
	for _, name := range []string{"bench-drift.svg", "bench-many.svg"} {
		if info, err := os.Stat(filepath.Join(pictures, name)); err != nil || info.Size() < 5000 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

// The committed page has the marks.
func TestThePageCanBeWritten(t *testing.T) {
	text := check.Value(os.ReadFile("docs/performance.md"))(t)
	path := filepath.Join(t.TempDir(), "page.md")
	check.NoError(t, os.WriteFile(path, text, 0o644))
	for _, s := range sections {
		check.NoError(t, measure.WriteSection(path, s.name, "new "+s.name+"\n"))
		begin, end := measure.Marks(s.name)
		after, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(after), begin+"new "+s.name+"\n"+end) {
			t.Errorf("%v:\n%s", err, after)
		}
	}
	if err := measure.WriteSection(path, "none", "new\n"); err == nil {
		t.Error("a section without marks was written")
	}
}

// What is wrong makes the run fail, and names itself.
func TestCheck(t *testing.T) {
	b := &bench{options: options{only: "drift,m"}}
	b.check(true, "fine")
	b.check(false, "%s left %s", "stock", measure.Drift(1000))
	if len(b.wrong) != 1 || b.wrong[0] != "stock left 1.00 µs" {
		t.Errorf("%q", b.wrong)
	}
	if !b.wanted("drift") || !b.wanted("many") || b.wanted("cont") || !(&bench{}).wanted("cont") {
		t.Error("sections are chosen wrongly")
	}
}
