// Package check has what every test says again and again: that nothing failed, that a figure is within its bound, that
// something comes in time.
//
// It is for tests alone, and a leaf: it knows nothing of ftclock. What tests of domains share is in package domaintest.
package check

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// NoError ends the test if there is an error.
func NoError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Value gives what a call returns, and ends the test if it returns an error, too: check.Value(os.ReadFile(path))(t).
func Value[T any](value T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		NoError(t, err)
		return value
	}
}

// Within checks that ns, which the words name, isn't off by more than bound, in either direction.
func Within(t testing.TB, ns, bound int64, format string, args ...any) {
	t.Helper()
	if ns > bound || ns < -bound {
		t.Errorf("%s: %d ns, more than %d ns", fmt.Sprintf(format, args...), ns, bound)
	}
}

// Await waits until done, and asks each time after a rest. It ends the test if that takes longer than within, which
// should be minutes: machines that run tests are busy. The words say what was waited for.
func Await(t testing.TB, within, rest time.Duration, done func() bool, format string, args ...any) {
	t.Helper()
	for end := time.Now().Add(within); !done(); time.Sleep(rest) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain: %s", within, fmt.Sprintf(format, args...))
		}
	}
}

// Count is the number in a variable of the environment, or normally where it is empty.
func Count(t testing.TB, variable string, normally int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return normally
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("%s=%s isn't a count", variable, text)
	}
	return n
}

// Random gives random numbers, whose seed is logged. FTCLOCK_SEED has them come again.
func Random(t testing.TB) (random *rand.Rand, seed uint64) {
	t.Helper()
	seed = rand.Uint64()
	if text := os.Getenv("FTCLOCK_SEED"); text != "" {
		seed = Value(strconv.ParseUint(text, 10, 64))(t)
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0)), seed
}

// Output runs a command, which must succeed, and gives what it prints, both streams.
func Output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}
