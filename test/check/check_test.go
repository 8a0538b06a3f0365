package check

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// recorder is a test that is watched: what fails it is kept.
type recorder struct {
	testing.TB
	said  []string
	ended bool
}

func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}
func (r *recorder) Errorf(format string, args ...any) {
	r.said = append(r.said, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatal(args ...any) { r.Fatalf("%s", fmt.Sprint(args...)) }

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	r.ended = true
	runtime.Goexit()
}

// Each check passes what is right, and fails a test for what is wrong: by an end where what follows would make no sense.
func TestChecks(t *testing.T) {
	wrong := errors.New("something went wrong")
	for _, c := range []struct {
		name  string
		check func(testing.TB)
		want  string // "": it passes
		ends  bool
	}{
		{"no error", func(t testing.TB) { NoError(t, nil) }, "", false},
		{"an error", func(t testing.TB) { NoError(t, wrong) }, "went wrong", true},
		{"a value", func(t testing.TB) { _ = Value(1, nil)(t) }, "", false},
		{"a value and an error", func(t testing.TB) { _ = Value(1, wrong)(t) }, "went wrong", true},
		{"within", func(t testing.TB) { Within(t, 10, 10, "drift"); Within(t, -10, 10, "drift") }, "", false},
		{"above", func(t testing.TB) { Within(t, 11, 10, "drift of %s", "web1") }, "drift of web1: 11 ns, more than 10 ns", false},
		{"below", func(t testing.TB) { Within(t, -11, 10, "drift") }, "drift: -11 ns", false},
		{"comes", func(t testing.TB) {
			n := 0
			Await(t, time.Minute, 0, func() bool { n++; return n > 2 }, "three")
		}, "", false},
		{"doesn't come", func(t testing.TB) {
			Await(t, time.Millisecond, time.Millisecond, func() bool { return false }, "the %s", "end")
		}, "in vain: the end", true},
		{"a command", func(t testing.TB) { _ = Output(t, exec.Command("true")) }, "", false},
		{"a command that fails", func(t testing.TB) { _ = Output(t, exec.Command("sh", "-c", "echo so; exit 3")) }, "exit status 3\nso", true},
		{"no count", func(t testing.TB) { _ = Count(t, "FTCLOCK_CHECK_WORD", 1) }, "isn't a count", true},
	} {
		t.Setenv("FTCLOCK_CHECK_WORD", "many")
		r := &recorder{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.check(r)
		}()
		<-done
		if said := strings.Join(r.said, "; "); (said == "") != (c.want == "") || !strings.Contains(said, c.want) || r.ended != c.ends {
			t.Errorf("%s: it says %q and ends the test: %v; want %q, %v", c.name, said, r.ended, c.want, c.ends)
		}
	}
}

func TestCountAndRandom(t *testing.T) {
	t.Setenv("FTCLOCK_CHECK_COUNT", "7")
	if n, normally := Count(t, "FTCLOCK_CHECK_COUNT", 1), Count(t, "FTCLOCK_CHECK_NONE", 3); n != 7 || normally != 3 {
		t.Errorf("%d and %d, want 7 and 3", n, normally)
	}
	t.Setenv("FTCLOCK_SEED", "5")
	a, seed := Random(t)
	b, _ := Random(t)
	if seed != 5 || a.Uint64() != b.Uint64() {
		t.Errorf("seed %d doesn't repeat", seed)
	}
}
