package qemuplugin

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
	for _, pattern := range []string{"*.[ch]", "testdata/*.c", "../clockpage/clockpage.h"} {
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

// The rule against a simulated host (rule_test.c), once with the seed that always served and once with one of the
// day. FTCLOCK_SEED=n repeats a run. Each run ends with years of pauses, from its seed on: 2, or FTCLOCK_SIM_SEEDS.
func TestRule(t *testing.T) {
	seeds := []string{"1", strconv.FormatInt(time.Now().UnixNano()%1_000_000_000, 10)}
	if seed := os.Getenv("FTCLOCK_SEED"); seed != "" {
		seeds = []string{seed}
	}
	years := os.Getenv("FTCLOCK_SIM_SEEDS")
	if years == "" {
		years = "2"
	}
	for name, flags := range map[string][]string{
		"sanitized": {"-O2", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"},
		// As the module is built: what the optimizer makes of the code is what runs in QEMU.
		"as built": {"-O2", "-fPIC", "-fvisibility=hidden"},
	} {
		t.Run(name, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "rule_test")
			compile(t, append(flags, "-o", program, "rule_test.c", "rule.c", "vcpus.c")...)
			for _, seed := range seeds {
				out, err := exec.Command(program, seed, years).CombinedOutput()
				if err != nil {
					t.Errorf("rule_test %s: %v\n%s", seed, err, out)
				}
				t.Logf("rule_test %s:\n%s", seed, out)
			}
		})
	}
}
