package qemuplugin

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// compile runs gcc, and ends the test if it isn't content.
func compile(t *testing.T, args ...string) {
	t.Helper()
	watchSources(t)
	out, err := exec.Command("gcc", append([]string{"-std=c11", "-Wall", "-Wextra", "-Werror"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("gcc %q: %v\n%s", args, err, out)
	}
}

// watchSources looks at all that gcc reads: the go command doesn't run a test again unless a file changed that the
// test itself opened or looked at.
func watchSources(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"*.[ch]", "scenarios/*.[ch]", "testdata/*.c", "../clockpage/clockpage.h"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("looking for %s: found %q, %v", pattern, files, err)
		}
		for _, f := range files {
			if _, err := os.Stat(f); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// compileScenarios builds rule_test from the rule, its scenarios and more sources.
func compileScenarios(t *testing.T, flags string, more ...string) (program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "rule_test")
	args := append(strings.Fields(flags), "-Iscenarios", "-o", program, "vcpus.c")
	for _, pattern := range []string{"rule*.c", "scenarios/*.c"} {
		sources, err := filepath.Glob(pattern)
		if err != nil || len(sources) == 0 {
			t.Fatalf("no %s", pattern)
		}
		args = append(args, sources...)
	}
	compile(t, append(args, more...)...)
	return program
}

// TestRule runs the scenarios of the clock's rule on a simulated host (scenarios/engine.h), each with the seed that
// always served and with one of the day. FTCLOCK_SEED=n repeats a run. The years of pauses take 2 seeds from there on,
// or FTCLOCK_SIM_SEEDS.
func TestRule(t *testing.T) {
	years, seeds := "2", []string{"1", strconv.FormatInt(time.Now().UnixNano()%1_000_000_000, 10)}
	if seed := os.Getenv("FTCLOCK_SEED"); seed != "" {
		years, seeds = "1", []string{seed}
	}
	if n := os.Getenv("FTCLOCK_SIM_SEEDS"); n != "" {
		years = n
	}
	sanitized := compileScenarios(t, "-O2 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined")
	// As the module is built: what the optimizer makes of the code is what runs in QEMU.
	asBuilt := compileScenarios(t, "-O2 -fPIC -fvisibility=hidden")
	names, err := exec.Command(asBuilt, "-list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(names)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, seed := range seeds {
				args := []string{name, seed}
				if strings.HasPrefix(name, "a_year_") {
					args = append(args, years)
				}
				var said [2]string
				for i, program := range []string{sanitized, asBuilt} {
					out, err := exec.Command(program, args...).CombinedOutput()
					if err != nil {
						t.Errorf("%v\n%s", err, out)
					}
					said[i] = string(out)
				}
				if said[0] != said[1] {
					t.Errorf("with sanitizers seed %s is another run:\n%snot\n%s", seed, said[0], said[1])
				}
				t.Log(said[1])
			}
		})
	}
}

// A seed is a run, and a scenario that fails says how to have that run again.
func TestScenariosReplay(t *testing.T) {
	const scenario = `#include "engine.h"
SCENARIO(broken) {
    anchored_guest();
    for (int i = 0; i < 9; i++) {
        in_case("row %d", i);
        CHECK(between(0, 1) == 1);
    }
}
`
	source := filepath.Join(t.TempDir(), "broken.c")
	if err := os.WriteFile(source, []byte(scenario), 0o600); err != nil {
		t.Fatal(err)
	}
	program := compileScenarios(t, "-O0", source)
	run := func(args ...string) (said string, status int) {
		cmd := exec.Command(program, args...)
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	first, _ := run("a_hold_that_is_preempted", "7")
	again, _ := run("a_hold_that_is_preempted", "7")
	other, _ := run("a_hold_that_is_preempted", "8")
	if first != again || first == other || !strings.Contains(first, "ok a_hold_that_is_preempted, seed 7, digest ") {
		t.Errorf("seed 7: %sagain: %sseed 8: %s", first, again, other)
	}
	failure, status := run("broken", "7")
	line := regexp.MustCompile(`^FAIL broken, seed 7, row \d: \S+/broken\.c:6: between\(0, 1\) == 1; ` +
		`replay: FTCLOCK_SEED=7 go test -run 'TestRule/broken\$' \./qemu-plugin\n$`)
	if again, _ := run("broken", "7"); status != 1 || !line.MatchString(failure) || failure != again {
		t.Errorf("status %d, %sagain: %s", status, failure, again)
	}
	if said, status := run("no_such"); status != 2 {
		t.Errorf("status %d: %s", status, said)
	}
}
