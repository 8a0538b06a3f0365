package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ftclock/clockpage"
	"ftclock/control"
	machine "ftclock/host"
	metadata "ftclock/xml-templates"
)

// tableWidth is what every table fits, in columns.
const tableWidth = 100

// column is a column of a table.
type column struct {
	title string
	right bool // numbers
}

// layTable lays rows out below their titles. Where that is wider than tableWidth, the first column gives way.
func layTable(columns []column, rows [][]string) []string {
	widths := make([]int, len(columns))
	total := 2 * (len(columns) - 1)
	for i, c := range columns {
		widths[i] = utf8.RuneCountInString(c.title)
		for _, row := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
		total += widths[i]
	}
	if total > tableWidth {
		widths[0] = max(widths[0]-(total-tableWidth), utf8.RuneCountInString(columns[0].title))
	}
	lay := func(cell func(int) string) string {
		var line strings.Builder
		for i, c := range columns {
			text := shorten(cell(i), widths[i])
			gap := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if c.right {
				line.WriteString(gap + text)
			} else {
				line.WriteString(text + gap)
			}
			line.WriteString("  ")
		}
		return strings.TrimRight(line.String(), " ")
	}
	lines := []string{lay(func(i int) string { return columns[i].title })}
	for _, row := range rows {
		lines = append(lines, lay(func(i int) string { return row[i] }))
	}
	return lines
}

func shorten(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	return string(r[:max(width-1, 0)]) + "…"
}

var statusColumns = []column{
	{"DOMAIN", false}, {"STATE", false}, {"METHOD", false}, {"PAUSES", true}, {"LOST IN ALL", true},
	{"LAST RESIDUAL", true}, {"WORST", true}, {"SINCE", false},
}

// printTable prints a line a domain, and below the table what is to be said about them.
func (u *ui) printTable(entries []entry) {
	rows := make([][]string, len(entries))
	for i, e := range entries {
		rows[i] = statusRow(e, time.Now())
	}
	for i, line := range layTable(statusColumns, rows) {
		if i > 0 {
			line = u.paintState(line, entries[i-1])
		}
		u.printf("%s\n", line)
	}
	for _, e := range entries {
		for _, remark := range remarks(e) {
			u.printf("%s: %s\n", oneLine(e.Name), remark)
		}
	}
}

// paintState colours the state. Two spaces stand before it, and in no name: oneLine saw to that.
func (u *ui) paintState(line string, e entry) string {
	colour := stateColour(e)
	at := strings.Index(line, "  "+string(e.State)) + len("  ")
	if colour == "" || at < len("  ") {
		return line
	}
	return line[:at] + u.paint(colour, string(e.State)) + line[at+len(e.State):]
}

func stateColour(e entry) string {
	switch {
	case e.bad():
		return red
	case e.State == control.Correcting:
		return green
	case e.State == control.Starting:
		return yellow
	}
	return ""
}

func statusRow(e entry, now time.Time) []string {
	name := oneLine(e.Name)
	if e.mute {
		return []string{name, string(e.State), "-", "-", "-", "-", "-", "-"}
	}
	last := "-"
	if n := len(e.Records); n > 0 {
		last = signedNS(e.Records[n-1].ResidualStop)
	}
	method := oneLine(e.Method)
	if method == "" {
		method = "-"
	}
	return []string{
		name, string(e.State), method, strconv.FormatUint(e.Pauses, 10), sayNS(e.CaughtUp + e.HeldTime), last, sayNS(e.WorstResidual),
		since(e.Since, now),
	}
}

// remarks are what isn't as it should be with a domain, and why.
func remarks(e entry) []string {
	var lines []string
	if e.Why != "" {
		lines = append(lines, oneLine(e.Why))
	} else if e.State == control.Watching {
		lines = append(lines, "its clock is left to QEMU, which loses every pause; see `ftclock enable --live "+shellWord(oneLine(e.Name))+"`")
	}
	if e.State == control.Unkept {
		lines = append(lines, unkept)
	}
	if e.Disagreements > 0 {
		line := fmt.Sprintf("shim and module disagreed about %s", count(e.Disagreements, "pause"))
		if e.LastDisagreement != "" {
			line += ", last: " + oneLine(e.LastDisagreement)
		}
		lines = append(lines, line)
	}
	if e.Kept != nil && e.Kept.Problem != "" {
		lines = append(lines, "its record isn't kept: "+oneLine(e.Kept.Problem)+"; fix the disk, and it goes on by itself")
	}
	for _, w := range e.Warnings {
		lines = append(lines, "warning: "+oneLine(w))
	}
	return lines
}

// printDetails prints all that is known of one domain.
func (u *ui) printDetails(e entry) {
	state := u.paint(stateColour(e), string(e.State))
	if e.mute {
		u.printf("%-16s %s\n%-16s %s\n%-16s %s\n", "domain", oneLine(e.Name), "uuid", oneLine(e.UUID), "state", state)
	} else {
		for _, line := range details(e, state) {
			u.printf("%-16s %s\n", line[0], line[1])
		}
	}
	for _, remark := range remarks(e) {
		u.printf("%s\n", remark)
	}
}

func details(e entry, state string) [][2]string {
	policy := oneLine(e.Clock)
	if policy == "" {
		policy = "watch only: the clock is QEMU's"
	}
	anchor := "none yet"
	if e.Anchor.Valid {
		anchor = fmt.Sprintf("number %d, known to ±%s", e.Anchor.Epoch, sayNS(e.Anchor.Error))
		if e.Anchor.Steer != 0 {
			anchor += ", steered " + signedNS(e.Anchor.Steer)
		}
	}
	lines := [][2]string{
		{"domain", oneLine(e.Name)},
		{"uuid", oneLine(e.UUID)},
		{"state", state},
		{"mode", sayMode(&e.Status)},
		{"module", loadedBy(e.Method)},
		{"policy", policy},
		{"guest's clock", sayGuestClock(e.GuestClock)},
		{"since", e.Since.Local().Format("2006-01-02 15:04:05 MST")},
		{"processes", fmt.Sprintf("QEMU %d, shim %d (%s)", e.QEMU, e.Shim, oneLine(e.Version))},
		{"pauses", pausesInAll(e.Status)},
		{"lost in all", sayNS(e.CaughtUp + e.HeldTime)},
		{"caught up", sayNS(e.CaughtUp)},
		{"held in all", sayNS(e.HeldTime)},
		{"worst residual", sayNS(e.WorstResidual)},
		{"worst cost", sayNS(e.WorstCost)},
		{"anchor", anchor},
	}
	if k := e.Kept; k != nil {
		lines = append(lines, [2]string{"record", fmt.Sprintf("%s in %s, %s missed", count(k.Pauses, "pause"), oneLine(k.Path), strconv.FormatUint(k.Missed, 10))},
			[2]string{"host's clock", sayHostClock(k.Host)})
	}
	for _, doubt := range []struct {
		name string
		n    uint64
	}{
		{"over limit", e.OverLimit}, {"anchored anew", e.Reanchored}, {"stale orders", e.StaleOrders}, {"concurrent calls", e.Busy},
	} {
		if doubt.n > 0 {
			lines = append(lines, [2]string{doubt.name, strconv.FormatUint(doubt.n, 10)})
		}
	}
	return lines
}

// direct says that the running domain's metadata wants its monitor left alone, at its next start if not at its last one.
func direct(s *control.Status) bool {
	policy, err := metadata.ParseElement([]byte(s.Clock))
	return err == nil && policy.Monitor == metadata.Direct
}

func sayMode(s *control.Status) string {
	const relay, watch = "relay: between libvirt and QEMU since the domain's start", "watch: beside libvirt and QEMU"
	ofLibvirt := s.Clock != "" && !strings.HasPrefix(s.UUID, "pid-")
	switch direct := direct(s); {
	case s.Mode == control.Relay && direct:
		return relay + "; a next start leaves its monitor alone"
	case s.Mode == control.Relay:
		return relay
	case direct:
		return watch + ", whose monitor is left alone"
	case s.Mode == control.Watch && ofLibvirt:
		return watch + "; a next start puts a relay between them"
	}
	return watch
}

// unkept is what is wrong with a guest on another clock.
const unkept = "not kept: the guest has switched on no clock that ftclock keeps (kvmclock, Hyper-V's reference time); any other but the TSC loses every pause"

// guestClocks are what a shim says of the guest's clock, in words.
var guestClocks = []struct {
	is   control.GuestClock
	says string
}{
	{control.KVMClock, "kvmclock is on"},
	{control.HyperVPage, "Hyper-V's reference time is on, by its page"},
	{control.HyperVCounter, "Hyper-V's reference time is on, by its counter"},
	{control.NoClockYet, "none that ftclock keeps yet; it runs for less than " + control.UnkeptAfter.String()},
	{control.NoClock, "none that ftclock keeps"},
	{control.ClockNotSeen, "not known before its next pause"},
	{control.ClockNotKnown, "not known: the kernel doesn't say"},
	{control.ClockOldModule, "not known: the module in QEMU is of a version that doesn't look; the next start has a new one"},
}

func sayGuestClock(clock control.GuestClock) string {
	for _, c := range guestClocks {
		if c.is == clock {
			return c.says
		}
	}
	return "not known"
}

func sayHostClock(h control.HostClock) string {
	switch {
	case h.Samples == 0:
		return "not known"
	case !h.Synchronised:
		return "not synchronised"
	}
	return fmt.Sprintf("synchronised, off by at most %s", sayNS(uint64(max(h.MaximumError, 0))))
}

func loadedBy(method string) string {
	switch method {
	case "":
		return "not loaded"
	case "ptrace":
		return "loaded by ptrace"
	case "preload":
		return "loaded by LD_PRELOAD"
	}
	return oneLine(method)
}

func pausesInAll(s control.Status) string {
	text := strconv.FormatUint(s.Pauses, 10)
	var parts []string
	for _, p := range []struct {
		n    uint64
		what string
	}{{s.Dropped, "dropped"}, {s.Anchored, "anchored"}, {s.Held, "held"}, {s.Passed, "passed"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.what))
		}
	}
	if len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	return text
}

var recordColumns = []column{
	{"PAUSE", true}, {"WENT ON AT", false}, {"EVENT", false}, {"LOST", true}, {"DECISION", false}, {"BY", false},
	{"RESIDUAL", true}, {"COST", true},
}

// printRecords prints the records of one domain, those that aren't the everyday kind with their reason.
func (u *ui) printRecords(e entry) {
	if len(e.Records) == 0 {
		u.printf("%s: no pause recorded yet\n", oneLine(e.Name))
		return
	}
	rows := make([][]string, len(e.Records))
	for i, r := range e.Records {
		rows[i] = recordRow(r, time.Local)
	}
	u.printf("%s:\n", oneLine(e.Name))
	for i, line := range layTable(recordColumns, rows) {
		u.printf("%s\n", line)
		if i > 0 {
			if why := unusual(e.Records[i-1]); why != "" {
				u.printf("  %s\n", why)
			}
		}
	}
}

func recordRow(r control.Record, zone *time.Location) []string {
	by := "policy"
	if r.Ordered {
		by = "order"
	}
	return []string{
		strconv.FormatUint(r.Number, 10), wallClock(r.ContReal, zone), oneLine(r.Event), signedNS(r.Lost), oneLine(r.Decision), by,
		signedNS(r.ResidualStop), sayNS(r.Cost),
	}
}

// unusual is a record's reason, unless its decision says it already.
func unusual(r control.Record) string {
	why := oneLine(r.Reason)
	switch r.Reason {
	case "", clockpage.NoReason.String(), clockpage.InTolerance.String(), clockpage.OutOfTolerance.String(),
		clockpage.ByThePolicy.String():
		why = ""
	}
	if r.TSC == clockpage.TSCUnmoved.String() {
		why += "; its TSC couldn't be moved with its clock"
	}
	return why
}

func wallClock(realNS uint64, zone *time.Location) string {
	if realNS == 0 || realNS > math.MaxInt64 {
		return "-"
	}
	return time.Unix(0, int64(realNS)).In(zone).Format("2006-01-02 15:04:05.000")
}

// since is short for a moment: today's hour, or the day.
func since(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	t = t.In(now.Location())
	if t.Format(time.DateOnly) == now.Format(time.DateOnly) {
		return t.Format(time.TimeOnly)
	}
	return t.Format(time.DateOnly)
}

// sayNS writes a time in the unit that suits it, with three significant digits or more.
func sayNS(ns uint64) string { return machine.Nanoseconds(ns) }

// signedNS is sayNS with a sign.
func signedNS(ns int64) string { return machine.SignedNanoseconds(ns) }

func count(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatUint(n, 10) + " " + noun + "s"
}
