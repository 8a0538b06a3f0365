package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
)

// terminal is a tmux with one pane.
type terminal struct {
	*testing.T
	socket string
}

// openTerminal runs a command line in a terminal of that size. The tmux is the test's own and ends with it.
func openTerminal(t *testing.T, dir string, width, height int, locale, command string) *terminal {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		t.Fatal("no tmux: apt-get install tmux")
	}
	term := &terminal{t, filepath.Join(dir, "tmux")}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TERM=screen", "TZ=UTC", "LC_ALL=" + locale, shimsVariable + "=" + dir, "NO_COLOR=" + os.Getenv("NO_COLOR")}
	start := exec.Command("tmux", "-u", "-S", term.socket, "-f", "/dev/null", "new-session", "-d", "-x", fmt.Sprint(width), "-y", fmt.Sprint(height),
		command+"; echo ended with $?; exec cat")
	start.Env = env
	if out, err := start.CombinedOutput(); err != nil {
		t.Fatalf("starting tmux: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the screen:\n%s", term.screen())
		}
		term.tmux("kill-server")
	})
	return term
}

func (t *terminal) tmux(args ...string) string {
	t.Helper()
	out, err := exec.Command("tmux", append([]string{"-u", "-S", t.socket}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("tmux %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (t *terminal) screen() string { return t.tmux("capture-pane", "-p") }

func (t *terminal) keys(keys ...string) { t.tmux(append([]string{"send-keys"}, keys...)...) }

// until waits for a screen on which all patterns are found.
func (t *terminal) until(patterns ...string) string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		screen := t.screen()
		missing := slices.IndexFunc(patterns, func(p string) bool { return !regexp.MustCompile(`(?m)` + p).MatchString(screen) })
		if missing < 0 {
			return screen
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %q on the screen", patterns[missing])
		}
	}
}

// pausedStatus is a domain with a record for each of the last seconds.
func pausedStatus(name, uuid string, now time.Time) control.Status {
	s := control.Status{Name: name, UUID: uuid, Version: "fake 1", Mode: control.Relay, State: control.Correcting, GuestClock: control.KVMClock, Method: "ptrace", QEMU: 4711, Shim: 4712,
		Since: now.Add(-time.Hour), Clock: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`,
		Counts: clockpage.Counts{Pauses: 1000, Dropped: 1000, CaughtUp: 5_010_000_000, WorstResidual: 240}, Anchor: clockpage.Anchor{Valid: 1, Epoch: 1, Error: 40}}
	for i := range 256 {
		at := now.Add(time.Duration(i-256) * time.Second)
		s.Records = append(s.Records, clockpage.Record{Number: uint64(745 + i), Ordered: 1,
			Outcome: clockpage.Outcome{Event: clockpage.Checkpoint, Decision: clockpage.Dropped, Reason: clockpage.InTolerance}, Lost: 5_010_000, ResidualStop: -12, Cost: 590, ContReal: uint64(at.UnixNano())})
	}
	return s
}

const noLibvirt = "ftclock -c test:///nowhere/at/all watch"

func TestWatch(t *testing.T) {
	now := time.Now()
	dir := shimsIn(t, pausedStatus("web1", "11111111-1111-4111-8111-111111111111", now))
	lost, err := fakeshim.Start(dir, pausedStatus("lost", "22222222-2222-4222-8222-222222222222", now))
	if err != nil {
		t.Fatal(err)
	}
	defer lost.Stop()
	evil := pausedStatus("zzz\x1b[2J\x1b[31m", "33333333-3333-4333-8333-333333333333", now)
	evil.State, evil.Why = control.Uncorrected, "the module\x1b[31m couldn't be loaded"
	evil.Records = nil
	last, err := fakeshim.Start(dir, evil)
	if err != nil {
		t.Fatal(err)
	}
	defer last.Stop()
	term := openTerminal(t, dir, 80, 24, "C.UTF-8", noLibvirt)

	screen := term.until(`^ftclock watch   3 domains, 1 with a problem +\d\d:\d\d:\d\d UTC$`, `^▸ lost +correcting +0.0 +-12 ns +240 ns  ▁{10,}`,
		`^  web1 +correcting`, `^  zzz \[2J \[31m +uncorrected`, `^q quit +↑↓ select +enter details$`, `libvirt can't be asked, only domains with a shim`)
	lines := strings.Split(strings.TrimRight(screen, "\n"), "\n")
	if len(lines) > 24 || slices.ContainsFunc(lines, func(l string) bool { return utf8.RuneCountInString(l) > 80 }) {
		t.Errorf("it doesn't fit 80x24:\n%s", screen)
	}

	// Pauses come, and one of them is bad.
	lost.Say(func(s *control.Status) {
		s.Pauses += 40
		r := s.Records[len(s.Records)-1]
		r.Number, r.ResidualStop, r.ContReal = s.Pauses, 500_000, uint64(time.Now().UnixNano())
		s.Records = append(s.Records[len(s.Records)-200:], r)
		s.WorstResidual = 500_000
	})
	// Of the 40 pauses one record is there: how the others went isn't known.
	term.until(`^▸ lost +correcting +[1-9][0-9.]* +\+500 µs +500 µs +[▁ ]*[·▁ ]*█`)

	// The selection moves, and says what is wrong.
	term.keys("Down", "Down")
	term.until(`^▸ zzz`, `^zzz \[2J \[31m: the module \[31m couldn't be loaded$`)
	term.keys("k")
	term.until(`^▸ web1`)

	// Details, to the last line and back.
	term.keys("Enter")
	term.until(`^domain +web1$`, `^pauses +1000: 1000 dropped$`, `^q quit +↑↓ scroll +esc back +\(\d+ lines below\)$`)
	term.keys("G")
	term.until(`^ +745  \d\d:\d\d:\d\d\.\d\d\d  checkpoint +\+5\.01 ms  dropped   order +-12 ns  590 ns$`, `^q quit +↑↓ scroll +esc back$`)
	term.keys("Escape")
	term.until(`^▸ web1`)

	endAndStart(term, dir, lost)

	resize(term)
	term.keys("q")
	term.until(`^ended with 0$`)
}

// resize makes the terminal smaller and larger.
func resize(term *terminal) {
	term.Helper()
	term.tmux("resize-window", "-x", "60", "-y", "10")
	term.until(`^q quit +↑↓ select +enter details$`, `^▸ web1 +correcting`)
	if screen := term.screen(); strings.Count(strings.TrimRight(screen, "\n"), "\n") > 9 {
		term.Errorf("it doesn't fit 60x10:\n%s", screen)
	}
	term.tmux("resize-window", "-x", "140", "-y", "30")
	term.until(`^▸ web1 +correcting .*▁{70,}`)
}

// endAndStart shows a shim that is killed, one that ends, and the domain's next start.
func endAndStart(term *terminal, dir string, lost *fakeshim.Shim) {
	term.Helper()
	// A shim that is killed leaves its directory; the others go on.
	lost.Kill()
	term.until(`^  lost +gone `, `2 with a problem`, `^▸ web1 +correcting`)
	// One that ends takes it along.
	if err := os.RemoveAll(lost.Path); err != nil {
		term.Fatal(err)
	}
	term.until(`^  lost +ended `, `1 with a problem`)
	// And the domain's next start.
	again, err := fakeshim.Start(dir, pausedStatus("lost", "22222222-2222-4222-8222-222222222222", time.Now()))
	if err != nil {
		term.Fatal(err)
	}
	term.Cleanup(again.Stop)
	term.until(`^  lost +correcting .*▁`)
}

// Without colour, in a terminal that has no more than ASCII.
func TestWatchPlain(t *testing.T) {
	t.Setenv("NO_COLOR", "1")
	dir := shimsIn(t, pausedStatus("web1", "11111111-1111-4111-8111-111111111111", time.Now()))
	term := openTerminal(t, dir, 80, 24, "C", noLibvirt)
	screen := term.until(`^> web1 +correcting +0\.0 +-12 ns +240 ns  _{10,}`, `^q quit   up/down select`)
	if i := strings.IndexFunc(screen, func(r rune) bool { return r > 126 }); i >= 0 {
		t.Errorf("not ASCII: %q", screen[i:min(i+20, len(screen))])
	}
	if escapes := term.tmux("capture-pane", "-p", "-e"); regexp.MustCompile(`\x1b\[[0-9;]*3[0-7]`).MatchString(escapes) {
		t.Errorf("coloured: %q", escapes)
	}
	term.keys("C-c")
	term.until(`^ended with 0$`)
}

// With libvirt, also the domains that have no shim. No domain at all is said, too.
func TestWatchLibvirt(t *testing.T) {
	dir := shimsIn(t)
	config, err := filepath.Abs(filepath.Join(dir, "host.xml"))
	if err != nil {
		t.Fatal(err)
	}
	node := `<node><domain type="test"><name>idle</name><memory>1024</memory><os><type>hvm</type></os>` +
		`<metadata><ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/></metadata></domain></node>`
	if err := os.WriteFile(config, []byte(node), 0o600); err != nil {
		t.Fatal(err)
	}
	term := openTerminal(t, dir, 80, 24, "C.UTF-8", "ftclock -c test://"+config+" watch")
	term.until(`^▸ idle +(off|unmanaged) +- +- +-$`)
	term.keys("q")
	term.until(`^ended with 0$`)

	term = openTerminal(t, t.TempDir(), 80, 24, "C.UTF-8", noLibvirt)
	term.until(`no domain is enabled`)
	term.keys("q")
	term.until(`^ended with 0$`)
}

func TestWatchNeedsATerminal(t *testing.T) {
	_, stderr, code := told("watch")
	if code != ui.ExitError || stderr != "ftclock: error: watch draws on a terminal, and there is none\nftclock: hint: `ftclock status` prints the same once\n" {
		t.Errorf("code %d, %s", code, stderr)
	}
}

// checkpoints pauses a fake shim's guest every period until the test ends.
func checkpoints(t *testing.T, f *fakeshim.Shim, period time.Duration, residual func(n uint64) int64) {
	done := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		tick := time.NewTicker(period)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			f.Say(func(s *control.Status) {
				s.Pauses++
				s.Dropped++
				s.CaughtUp += 5_010_000
				r := s.Records[len(s.Records)-1]
				r.Number, r.ContReal, r.ResidualStop = s.Pauses, uint64(time.Now().UnixNano()), residual(s.Pauses)
				s.Records = append(slices.Clone(s.Records[1:]), r)
				s.WorstResidual = max(s.WorstResidual, uint64(max(r.ResidualStop, -r.ResidualStop)))
			})
		}
	})
	t.Cleanup(func() { close(done); group.Wait() })
}

// What a terminal of 80x24 shows of some domains under checkpoints. With FTCLOCK_PICTURES it is kept there.
func TestWatchUnderCheckpoints(t *testing.T) {
	dir := shimsIn(t)
	now := time.Now()
	keep := func(name, text string) {
		if to := os.Getenv("FTCLOCK_PICTURES"); to != "" {
			if err := os.WriteFile(filepath.Join(to, name), []byte(strings.TrimRight(text, "\n ")+"\n"), 0o644); err != nil {
				t.Error(err)
			}
		}
	}
	for i, domain := range []struct {
		name   string
		period time.Duration
		state  control.State
		why    string
	}{
		{"db1", 50 * time.Millisecond, control.Correcting, ""},
		{"mail", time.Second, control.Correcting, ""},
		{"queue1", 10 * time.Millisecond, control.Correcting, ""},
		{"test3", 100 * time.Millisecond, control.Watching, ""},
		{"web1", 50 * time.Millisecond, control.Correcting, ""},
		{"web2", 0, control.Uncorrected, "reaching into QEMU: not permitted to trace: this process lacks CAP_SYS_PTRACE"},
	} {
		s := pausedStatus(domain.name, fmt.Sprintf("%d1111111-1111-4111-8111-111111111111", i), now)
		s.State, s.Why = domain.state, domain.why
		if domain.period == 0 {
			s.Records, s.Pauses, s.Dropped, s.CaughtUp, s.WorstResidual, s.Method = nil, 0, 0, 0, 0, ""
		}
		f, err := fakeshim.Start(dir, s)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.Stop)
		if domain.period > 0 {
			checkpoints(t, f, domain.period, func(n uint64) int64 {
				if n%130 == 0 && domain.name == "mail" || n%317 == 0 {
					return 2_400
				}
				return int64(n*n*31%171) - 40
			})
		}
	}
	term := openTerminal(t, dir, 80, 24, "C.UTF-8", noLibvirt)
	screen := term.until(`6 domains, 2 with a problem`, `^▸ db1 +correcting +[1-9]\d?\.\d .*[▁▂]{4}`, `^  queue1 +correcting +[1-9]\d?\d\.\d `)
	keep("watch.txt", screen)
	term.keys("Enter")
	keep("watch-details.txt", term.until(`^domain +db1$`, `^pauses a second +[1-9]`))
	term.keys("q")
	term.until(`^ended with 0$`)

	term = openTerminal(t, t.TempDir(), 100, 24, "C.UTF-8", "SHIMS="+dir+" ftclock -c test:///default status 2>/dev/null")
	keep("status.txt", strings.ReplaceAll(term.until(`^DOMAIN +STATE`, `^ended with 1$`), "ended with 1", ""))
}
