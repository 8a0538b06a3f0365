package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/record"
	"ftclock/report"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

// agreeWithin is how far two figures of the same thing may lie apart.
const agreeWithin = time.Microsecond

// kept reads a domain's record, after its shim has written what it has.
func kept(t *testing.T, d *privatelibvirt.Domain) (*record.Record, []record.Pause) {
	t.Helper()
	uuid := domaintest.UUID(t, d)
	_, _ = control.Ask(control.Dir, uuid, control.Request{Do: "status"})
	r := check.Value(record.Read(host.DataDir, uuid, time.Time{}, time.Time{}))(t)
	pauses, problems, err := record.Pauses(host.DataDir, uuid, time.Time{}, time.Time{})
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	return r, pauses
}

func missedIn(m record.Minute) (n uint64) {
	for _, x := range m.Missed {
		n += x.Count
	}
	return n
}

// metricsOf scrapes the installed exporter: values by name and labels.
func metricsOf(t *testing.T) map[string]float64 {
	t.Helper()
	return metricsBy(t, nil, "")
}

// metricsBy is metricsOf for another user, whom the exporter must warn so.
func metricsBy(t *testing.T, who *syscall.Credential, warning string) map[string]float64 {
	t.Helper()
	cmd := ftclockCommand("exporter", "--web.listen-address", "127.0.0.1:0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	out := check.Value(cmd.StdoutPipe())(t)
	check.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the exporter's end: %v", err)
		}
		if said := stderr.String(); !strings.HasPrefix(said, warning) || (warning == "") != (said == "") {
			t.Errorf("the exporter says %q, want %q", said, warning)
		}
	}()
	line := check.Value(bufio.NewReader(out).ReadString('\n'))(t)
	answer := check.Value(http.Get(regexp.MustCompile(`http://\S+`).FindString(line)))(t)
	defer http.DefaultClient.CloseIdleConnections()
	defer answer.Body.Close()
	text := check.Value(io.ReadAll(answer.Body))(t)
	values := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		end := strings.LastIndexByte(line, ' ')
		if end < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if v, err := strconv.ParseFloat(line[end+1:], 64); err == nil {
			values[line[:end]] = v
		}
	}
	return values
}

// statusJSON is what `ftclock status --format json` says of each domain; its exit code is code.
func statusJSON(t *testing.T, code int) map[string]control.Status {
	t.Helper()
	out, err := ftclockCommand("status", "--format", "json", "--records", "1").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == code {
		err = nil
	}
	var all []control.Status
	if err = errors.Join(err, json.Unmarshal(out, &all)); err != nil {
		t.Fatal(err)
	}
	byName := map[string]control.Status{}
	for _, s := range all {
		byName[s.Name] = s
	}
	return byName
}

// look is the guest's offset, and the number of a pause right behind that look, at whose stop the kernel's clock was recorded.
type look struct {
	offset int64
	number uint64
}

// looks takes some, of which the best counts: a guest's offset is seen too large by what the look took, never too small. On a busy
// machine it takes more of them, until the best is confirmed by another one.
func looks(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock) (all []look) {
	t.Helper()
	const some, most = 6, 18
	for len(all) < some || clock != nil && len(all) < most && !confirmed(t, d, all) {
		var l look
		if clock != nil {
			l.offset = offset(t, clock)
		}
		pause(t, d, 5*time.Millisecond)
		l.number = status(t, d).Pauses
		all = append(all, l)
	}
	return all
}

// confirmed tells whether the two best looks are alike.
func confirmed(t *testing.T, d *privatelibvirt.Domain, all []look) bool {
	t.Helper()
	_, pauses := kept(t, d)
	var late []int64
	for _, l := range all {
		late = append(late, l.offset-recorded(pauses, l))
	}
	slices.Sort(late)
	return late[1]-late[0] < int64(agreeWithin)
}

// recorded is what the record says of the guest's offset at the pause behind a look, ns.
func recorded(pauses []record.Pause, l look) int64 {
	p := pauses[l.number-1]
	return int64(p.StopRaw - p.Saved)
}

// best gives the offset of the guest's clock against CLOCK_MONOTONIC_RAW, ns, by itself and by the record, where the guest's was
// seen best.
func best(pauses []record.Pause, all []look) (byGuest, byRecord int64) {
	least := int64(math.MaxInt64)
	for _, l := range all {
		r := recorded(pauses, l)
		if l.offset-r < least {
			least, byGuest, byRecord = l.offset-r, l.offset, r
		}
	}
	return byGuest, byRecord
}

// Several domains are checkpointed 20 times a second each, all but one of them corrected and that one only watched. What status, the exporter
// the record, the report and watch say, and what the guests' own clocks say, is one. Two of the domains have the measuring guest, which takes a
// processor for itself, the others none; with FTCLOCK_RECORD_TIME, how long it is to last, there are eight and all have it.
func TestKVMStatusExporterAndRecordAgree(t *testing.T) {
	const rate = 20
	domains, length, measuring := 4, 6*time.Second, map[int]bool{0: true, 3: true}
	if text := os.Getenv("FTCLOCK_RECORD_TIME"); text != "" {
		length = check.Value(time.ParseDuration(text))(t)
		domains = 8
		for i := range domains {
			measuring[i] = true
		}
	}
	type subject struct {
		*privatelibvirt.Domain
		clock         *guest.Clock // nil: it has no guest
		before, after []look
	}
	var all []*subject
	for i := range domains {
		x := managed("agree-"+strconv.Itoa(i), clockElement)
		if measuring[i] {
			d, clock := start(t, x)
			all = append(all, &subject{Domain: d, clock: clock})
			continue
		}
		x.OS.Kernel = ""
		d := define(t, x)
		check.NoError(t, d.Create())
		all = append(all, &subject{Domain: d})
	}
	t.Cleanup(func() { // all at once: what is left is looked for at the end of each
		for _, s := range all {
			_ = s.Destroy()
		}
	})
	watched := all[domains-1]
	ftclock(t, "disable", watched.Name, "--live")
	for _, s := range all {
		pause(t, s.Domain, 5*time.Millisecond) // for the anchor
		s.before = looks(t, s.Domain, s.clock)
	}

	var group sync.WaitGroup
	for _, s := range all {
		group.Go(func() {
			period := time.Second / rate
			for end, next := time.Now().Add(length), time.Now(); time.Now().Before(end); {
				time.Sleep(time.Until(next))
				if err := s.Suspend(); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(5 * time.Millisecond)
				if err := s.Resume(); err != nil {
					t.Error(err)
					return
				}
				if next = next.Add(period); time.Since(next) > period {
					next = time.Now()
				}
			}
		})
	}
	group.Wait()
	for _, s := range all {
		s.after = looks(t, s.Domain, s.clock)
	}

	statuses := statusJSON(t, 1) // one is only watched
	metrics := metricsOf(t)
	viewsAgree(t, statuses)
	for _, s := range all {
		status := statuses[s.Name]
		r, pauses := kept(t, s.Domain)
		total := r.Total()
		if total.Pauses != status.Pauses || uint64(len(pauses)) != status.Pauses || missedIn(total) != 0 {
			t.Errorf("%s: %d pauses by the status, %d by the record, %d one by one, %d missed", s.Name, status.Pauses, total.Pauses, len(pauses), missedIn(total))
		}
		if total.CaughtUp != status.CaughtUp || total.Held != status.HeldTime || total.Passed != status.PassedTime || total.Lost != status.Lost() {
			t.Errorf("%s: %d ns caught up, %d held and %d passed by the status, %d, %d and %d by the record", s.Name, status.CaughtUp, status.HeldTime,
				status.PassedTime, total.CaughtUp, total.Held, total.Passed)
		}
		near := func(what string, a, b float64) {
			if math.Abs(a-b) > agreeWithin.Seconds() {
				t.Errorf("%s: %s: %.9f s and %.9f s", s.Name, what, a, b)
			}
		}
		labels := fmt.Sprintf(`domain="%s",`, s.Name)
		get := func(name, more string) float64 {
			t.Helper()
			v, found := metrics[fmt.Sprintf(`ftclock_%s{%s%suuid="%s"}`, name, more, labels, status.UUID)]
			if !found {
				v, found = metrics[fmt.Sprintf(`ftclock_%s{%s%suuid="%s"}`, name, labels, more, status.UUID)]
			}
			if !found {
				t.Errorf("%s: there is no metric %s", s.Name, name)
			}
			return v
		}
		var counted float64
		for _, decision := range []string{"dropped", "anchored", "held", "passed"} {
			counted += get("pauses_total", `decision="`+decision+`",`)
		}
		if uint64(counted) != status.Pauses || get("recorded_pauses_total", "") != counted || get("missed_pauses_total", "") != 0 {
			t.Errorf("%s: the exporter counts %v pauses, the status %d", s.Name, counted, status.Pauses)
		}
		if bad := get("domain_uncorrected", "") == 1; bad != (s == watched) {
			t.Errorf("%s: the exporter says that it isn't corrected: %t", s.Name, bad)
		}
		lastPause := pauses[len(pauses)-1]
		near("caught up", get("caught_up_seconds_total", ""), float64(total.CaughtUp)/1e9)
		near("held", get("held_seconds_total", ""), float64(total.Held)/1e9)
		near("last residual, exporter and record", get("last_residual_seconds", ""), float64(lastPause.ResidualStop)/1e9)
		near("last residual, status and record", float64(status.Records[0].ResidualStop)/1e9, float64(lastPause.ResidualStop)/1e9)
		near("worst residual, status and exporter", float64(status.WorstResidual)/1e9, get("worst_residual_seconds", ""))
		near("worst residual, status and record", float64(status.WorstResidual)/1e9, float64(total.Residual.Worst())/1e9)

		t.Logf("%s: %d pauses of %v, %v of it not caught up; worst residual %d ns", s.Name, total.Pauses, time.Duration(total.Lost),
			time.Duration(total.Held+total.Passed), total.Residual.Worst())
		var lost int64
		if s.clock != nil {
			guestThen, recordThen := best(pauses, s.before)
			guestNow, recordNow := best(pauses, s.after)
			byGuest := guestNow - guestThen
			lost = recordNow - recordThen
			t.Logf("%s: the guest lost %d ns by its own clock, %d ns by the record, by %d looks before and %d after", s.Name, byGuest, lost,
				len(s.before), len(s.after))
			// Two looks from outside, each of which a busy machine may have made too late by a microsecond.
			if apart := byGuest - lost; apart > int64(3*agreeWithin) || apart < -int64(3*agreeWithin) {
				t.Errorf("%s: the guest lost %d ns by itself, %d ns by the record", s.Name, byGuest, lost)
			}
		}
		if total.Pauses < 10 { // how many there are is the machine's business
			t.Errorf("%s: only %d pauses", s.Name, total.Pauses)
		}
		if s == watched {
			if lost < int64(total.Held/2) || total.Held == 0 || len(r.Gaps) == 0 || r.Gaps[0].Kind != record.Uncorrected {
				t.Errorf("%s is only watched: %d ns lost, gaps %+v", s.Name, lost, r.Gaps)
			}
		} else if len(r.Gaps) != 0 {
			t.Errorf("%s: gaps %+v", s.Name, r.Gaps)
		}
		if total.Host.Samples == 0 {
			t.Errorf("%s: nothing is known of the host's clock", s.Name)
		}
	}
	// One more figure for each, by the command that asks the kernel.
	if out := ftclock(t, "verify", all[0].Name); !strings.Contains(out, "kvmclock holds") {
		t.Error(out)
	}
	out, err := ftclockCommand("verify", watched.Name).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "doesn't hold") || !strings.Contains(string(out), "only watched") {
		t.Errorf("%v: %s", err, out)
	}
	t.Logf("%s", out)
}

// What isn't known is shown as that: the pair is killed, more pauses come than the ring holds, and a new shim comes. A newer
// version's file in the domain's directory is let alone.
func TestKVMRecordShowsGaps(t *testing.T) {
	d, _ := start(t, privatelibvirt.GuestXML("gaps", elf))
	uuid := domaintest.UUID(t, d)
	dir := record.Path(host.DataDir, uuid)
	check.NoError(t, os.MkdirAll(dir, 0o700))
	newer := filepath.Join(dir, "timeline-000003.log")
	const text = `831a2e30 {"kind":"head","format":"ftclock-record","version":2,"holds":"timeline","uuid":""}` + "\nwhat version 2 has\n"
	check.NoError(t, os.WriteFile(newer, []byte(text), 0o600))
	ftclock(t, "enable", "gaps", "--live")
	pauses(t, d, 20, time.Millisecond)
	s := status(t, d)
	for _, pid := range []int{s.Keeper, s.Shim} {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil { // or one would replace the other
			t.Fatal(err)
		}
	}
	for _, pid := range []int{s.Keeper, s.Shim} {
		check.NoError(t, unix.Kill(pid, unix.SIGKILL))
	}
	pauses(t, d, 300, time.Millisecond)
	ftclock(t, "enable", "gaps", "--live")
	pauses(t, d, 20, time.Millisecond)
	s = status(t, d)
	r, _ := kept(t, d)
	total := r.Total()
	t.Logf("%d pauses, %d in the record, %d missed; gaps %+v", s.Pauses, total.Pauses, missedIn(total), r.Gaps)
	if total.Pauses+missedIn(total) != s.Pauses || missedIn(total) < 300-clockpage.RingLen {
		t.Errorf("%d pauses, %d in the record, %d missed", s.Pauses, total.Pauses, missedIn(total))
	}
	if s.Kept == nil || s.Kept.Pauses != total.Pauses || s.Kept.Missed != missedIn(total) {
		t.Errorf("status: %+v", s.Kept)
	}
	var down, lost, unread bool
	for _, g := range r.Gaps {
		switch g.Kind {
		case record.Down:
			down = strings.Contains(g.Why, "the shim was killed; QEMU ran on")
		case record.NotKept:
			lost = g.Pauses >= 300-clockpage.RingLen && strings.Contains(g.Why, "overwritten")
		case record.Newer:
			unread = strings.Contains(g.Why, newer)
		default:
			t.Errorf("gap: %+v", g)
		}
	}
	if !down || !lost || !unread {
		t.Errorf("gaps: %+v", r.Gaps)
	}
	gapsInReport(t, "gaps")
	if now, err := os.ReadFile(newer); err != nil || string(now) != text {
		t.Errorf("the newer version's file: %q, %v", now, err)
	}
	ftclock(t, "disable", "gaps", "--live")
	r, _ = kept(t, d)
	last := r.Spans[len(r.Spans)-1]
	if last.To.IsZero() {
		t.Errorf("the record has no end: %+v", r.Spans)
	}
}

// gapsInReport holds the report of a domain that has all three kinds of gaps against them: each is told, and none of the limits is
// said to be kept.
func gapsInReport(t *testing.T, name string) {
	t.Helper()
	made := func(format string) []byte {
		out, err := ftclockCommand("report", name, "--format", format).Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 { // the newer version's file couldn't be read
			t.Fatalf("the report as %s: %v", format, err)
		}
		return out
	}
	var r report.Report
	check.NoError(t, json.Unmarshal(made("json"), &r))
	page := string(made("html"))
	for _, kind := range []record.GapKind{record.Down, record.NotKept, record.Newer} {
		if !slices.ContainsFunc(r.Gaps, func(g report.Gap) bool { return g.Kind == string(kind) }) || !strings.Contains(page, string(kind)) {
			t.Errorf("the report doesn't tell of the gap %q: %+v", kind, r.Gaps)
		}
	}
	if s := r.Statement; s.Unknown == 0 || s.Missed == 0 || s.Coverage >= 1 || len(s.Findings) == 0 {
		t.Errorf("the report's statement: %+v", s)
	}
	if !strings.Contains(page, "not shown: ") || strings.Contains(page, "kept, from") {
		t.Errorf("the report's verdicts, over gaps:\n%s", page)
	}
}

// Workers that are killed while the domain is checkpointed lose nothing, and count nothing twice.
func TestKVMRecordSurvivesKills(t *testing.T) {
	d, _ := start(t, managed("kills", clockElement))
	kills := 0
	for i := range 200 {
		pause(t, d, 2*time.Millisecond)
		if i%20 == 10 {
			check.NoError(t, unix.Kill(status(t, d).Shim, unix.SIGKILL))
			kills++
		}
	}
	pause(t, d, time.Millisecond)
	s := status(t, d)
	r, pauses := kept(t, d)
	total := r.Total()
	if s.Workers != uint64(kills)+1 || total.Pauses != s.Pauses || uint64(len(pauses)) != s.Pauses || total.CaughtUp != s.CaughtUp || len(r.Gaps) != 0 {
		t.Errorf("%d workers, %d pauses by the status, %d by the record, %d one by one; %d and %d ns; gaps %+v", s.Workers, s.Pauses,
			total.Pauses, len(pauses), s.CaughtUp, total.CaughtUp, r.Gaps)
	}
}

// A record that can't be written is no reason to do anything else worse.
func TestKVMNoRoomForTheRecord(t *testing.T) {
	d, clock := start(t, managed("full", clockElement))
	pause(t, d, 5*time.Millisecond)
	uuid := domaintest.UUID(t, d)
	_ = status(t, d)
	dir := record.Path(host.DataDir, uuid)
	check.NoError(t, unix.Mount("ftclock-test", dir, "tmpfs", 0, "size=4k"))
	check.NoError(t, os.WriteFile(filepath.Join(dir, "full"), make([]byte, 4096), 0o600))
	mounted := true
	t.Cleanup(func() {
		if mounted {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	before := offset(t, clock)
	pauses(t, d, 50, 5*time.Millisecond)
	s := status(t, d)
	check.Within(t, offset(t, clock)-before, maxDrift, "drift")
	if s.State != control.Correcting || s.Kept == nil || !strings.Contains(s.Kept.Problem, "no space left") {
		t.Errorf("status: %s, %+v", s.State, s.Kept)
	}
	if out := ftclock(t, "status"); !strings.Contains(out, "full: its record isn't kept: ") {
		t.Error(out)
	}
	if n := strings.Count(shimLog("full"), "the record of this clock isn't kept"); n != 1 {
		t.Errorf("it is logged %d times:\n%s", n, shimLog("full"))
	}
	check.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	mounted = false
	pause(t, d, 5*time.Millisecond)
	s = status(t, d)
	r, _ := kept(t, d)
	if total := r.Total(); s.Kept.Problem != "" || total.Pauses+missedIn(total) != s.Pauses {
		t.Errorf("%+v; %d and %d of %d pauses", s.Kept, total.Pauses, missedIn(total), s.Pauses)
	}
}

// Who may not ask is told so, by an exit code that isn't that of a bad clock.
func TestKVMWithoutRights(t *testing.T) {
	d, _ := start(t, managed("rights", clockElement))
	for _, args := range [][]string{{"status"}, {"verify", d.Name}} {
		cmd := ftclockCommand(args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(string(out), "ftclock: hint: run it as root") {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	if metrics := metricsBy(t, nobody, "ftclock: warning: only root may ask the shims"); metrics["ftclock_shims_readable"] != 0 {
		t.Errorf("by the exporter of nobody the shims can be read: %v", metrics)
	}
	if metrics := metricsOf(t); metrics["ftclock_shims_readable"] != 1 {
		t.Errorf("by root's exporter the shims can't be read: %v", metrics)
	}
}
