package e2e

import (
	"encoding/json"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/report"
	"ftclock/test/check"
	"ftclock/test/privatelibvirt"
)

// viewsAgree holds the report of each domain, and the screen of watch, against the status. No pause may come meanwhile.
func viewsAgree(t *testing.T, statuses map[string]control.Status) {
	t.Helper()
	screen := watchScreen(t, len(statuses))
	for name, status := range statuses {
		near := func(what string, a, b int64) {
			t.Helper()
			if d := time.Duration(a - b); d > agreeWithin || d < -agreeWithin {
				t.Errorf("%s: %s: %d ns, the status has %d", name, what, a, b)
			}
		}
		out, err := ftclockCommand("report", name, "--format", "json").Output()
		var r report.Report
		if err == nil {
			err = json.Unmarshal(out, &r)
		}
		if err != nil {
			t.Errorf("%s: the report: %v", name, err)
			continue
		}
		s := r.Statement
		if s.Pauses != status.Pauses || s.Missed != 0 || r.Name != name || r.UUID != status.UUID {
			t.Errorf("%s: the report tells of %d pauses and %d missed, the status of %d", name, s.Pauses, s.Missed, status.Pauses)
		}
		near("caught up in the report", int64(s.CaughtUp), int64(status.CaughtUp))
		near("held in the report", int64(s.Held), int64(status.HeldTime))
		near("passed in the report", int64(s.Passed), int64(status.PassedTime))
		near("largest divergence in the report", s.Divergence, int64(status.WorstResidual))
		if watched := status.State == control.Watching; watched == (s.Uncorrected == 0) || watched == (len(s.Findings) == 0) {
			t.Errorf("%s is %s: %v uncorrected in the report, %q", name, status.State, s.Uncorrected, s.Findings)
		}

		// Name, state, rate, last residual, worst residual.
		row := regexp.MustCompile(`(?m)^[▸ ] ` + name + ` +(\w+) +\S+ +([-+]?[0-9.]+ [nµm]?s) +([0-9.]+ [nµm]?s)`).FindStringSubmatch(screen)
		if row == nil || row[1] != string(status.State) {
			t.Errorf("%s: not on the screen as %s:\n%s", name, status.State, screen)
			continue
		}
		near("last residual on the screen", inNS(t, row[2]), status.Records[0].ResidualStop)
		near("worst residual on the screen", inNS(t, row[3]), int64(status.WorstResidual))
	}
}

func inNS(t *testing.T, text string) int64 {
	t.Helper()
	number, unit, _ := strings.Cut(text, " ")
	v, err := strconv.ParseFloat(number, 64)
	if err != nil {
		t.Error(err)
	}
	return int64(math.Round(v * map[string]float64{"ns": 1, "µs": 1e3, "ms": 1e6, "s": 1e9}[unit]))
}

// watchScreen is what watch shows of so many domains in a terminal.
func watchScreen(t *testing.T, domains int) string {
	t.Helper()
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		privatelibvirt.LeaveOut(t, "no tmux: apt-get install tmux")
	}
	call := func(args ...string) string {
		out := check.Output(t, exec.Command(tmux, append([]string{"-u", "-f", "/dev/null", "-S", filepath.Join(privatelibvirt.Dir, "tmux")}, args...)...))
		return string(out)
	}
	call("new-session", "-d", "-x", "80", "-y", "24", "env LC_ALL=C.UTF-8 "+privatelibvirt.Prefix+"/bin/ftclock watch; exec cat")
	defer call("kill-server")
	ready := regexp.MustCompile(`(?m)^[▸ ] \S+ +(correcting|watching) +[0-9.]+ `) // with a rate: each was asked twice
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		screen := call("capture-pane", "-p")
		if len(ready.FindAllString(screen, -1)) == domains {
			call("send-keys", "q")
			return screen
		}
		if time.Now().After(deadline) {
			t.Fatalf("not all of %d domains on the screen:\n%s", domains, screen)
		}
	}
}
