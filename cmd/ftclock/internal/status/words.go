package status

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// Remarks are the problems of a domain, with their reasons, each one line.
func Remarks(e Entry) []string {
	var lines []string
	if e.Why != "" {
		lines = append(lines, host.OneLine(e.Why))
	} else if e.State == control.Watching {
		lines = append(lines, "its clock is left to QEMU, which loses every pause; see `"+correct(host.OneLine(e.Name), e.UUID)+"`")
	}
	if e.State == control.Unkept {
		lines = append(lines, UnkeptText)
	}
	if e.Disagreements > 0 {
		line := fmt.Sprintf("shim and module disagreed about %s", ui.Count(e.Disagreements, "pause"))
		if e.LastDisagreement != "" {
			line += ", last: " + host.OneLine(e.LastDisagreement)
		}
		lines = append(lines, line)
	}
	if e.Kept != nil && e.Kept.Problem != "" {
		lines = append(lines, "its record isn't kept: "+host.OneLine(e.Kept.Problem)+"; once the disk works, it goes on by itself")
	}
	for _, w := range e.Warnings {
		lines = append(lines, "warning: "+host.OneLine(w))
	}
	return lines
}

// Details are all that is known of one domain, names and values; state may be coloured.
func Details(e Entry, state string) [][2]string {
	lines := [][2]string{{"domain", host.OneLine(e.Name)}, {"uuid", host.OneLine(e.UUID)}, {"state", state}}
	if e.Mute {
		return lines
	}
	policy := cmp.Or(host.OneLine(e.Clock), "watch only: the clock isn't corrected")
	if e.Policy != "" {
		since := ", since its start"
		if _, _, ok := host.ProcessOf(e.UUID); ok { // of which the policy may have come later
			since = ""
		}
		policy += since + "; the host's, from " + host.OneLine(e.Policy)
	}
	anchor := "none yet"
	if e.Anchor.Valid == 1 {
		anchor = fmt.Sprintf("number %d, known to ±%s", e.Anchor.Epoch, host.Nanoseconds(e.Anchor.Error))
		if e.Anchor.Steer != 0 {
			anchor += ", steered " + host.SignedNanoseconds(e.Anchor.Steer)
		}
	}
	lines = append(lines, [][2]string{
		{"mode", sayMode(&e.Status)},
		{"module", loadedBy(e.Method)},
		{"policy", policy},
		{"guest's clock", GuestClock(e.GuestClock)},
		{"since", e.Since.Local().Format("2006-01-02 15:04:05 MST")},
		{"processes", fmt.Sprintf("QEMU %d, shim %d (%s)", e.QEMU, e.Shim, host.OneLine(e.Version))},
		{"pauses", PausesInAll(&e.Status)},
		{"lost in all", host.Nanoseconds(e.Lost())},
		{"caught up", host.Nanoseconds(e.CaughtUp)},
		{"held in all", host.Nanoseconds(e.HeldTime)},
		{"worst residual", host.Nanoseconds(e.WorstResidual)},
		{"worst cost", host.Nanoseconds(e.WorstCost)},
		{"anchor", anchor},
	}...)
	if e.PassedTime > 0 {
		lines = append(lines, [2]string{"passed in all", host.Nanoseconds(e.PassedTime)})
	}
	if k := e.Kept; k != nil {
		lines = append(lines, [2]string{"record", fmt.Sprintf("%s in %s, %s missed", ui.Count(k.Pauses, "pause"), host.OneLine(k.Path), strconv.FormatUint(k.Missed, 10))},
			[2]string{"host's clock", sayHostClock(k.Host)})
	}
	for _, c := range Doubts(&e.Status) {
		if c.N > 0 {
			lines = append(lines, [2]string{c.Name, strconv.FormatUint(c.N, 10)})
		}
	}
	return lines
}

// Direct tells whether the running domain's metadata asks for a direct monitor, which takes effect at a start.
func Direct(s *control.Status) bool {
	policy, err := metadata.ParseElement([]byte(s.Clock))
	return err == nil && policy.Monitor == metadata.Direct
}

func sayMode(s *control.Status) string {
	const relay, watch = "relay: between libvirt and QEMU since the domain's start", "watch: beside libvirt and QEMU"
	_, _, process := host.ProcessOf(s.UUID)
	switch direct := Direct(s); {
	case s.Mode == control.Watch && process:
		return "watch: beside QEMU"
	case s.Mode == control.Relay && direct:
		return relay + "; a next start leaves its monitor alone"
	case s.Mode == control.Relay:
		return relay
	case direct:
		return watch + ", whose monitor is left alone"
	case s.Mode == control.Watch && s.Clock != "":
		return watch + "; a next start puts a relay between them"
	}
	return watch
}

// UnkeptText is the remark about a guest on a clock that ftclock can't correct.
const UnkeptText = "not kept: the guest has switched on no clock that ftclock keeps (kvmclock, Hyper-V's reference time); any other but the TSC loses every pause"

// ClockWords are a guest's clock and what is said of it.
type ClockWords struct {
	Is   control.GuestClock
	Says string
}

// GuestClocks are the values of control.GuestClock in words.
var GuestClocks = []ClockWords{
	{control.KVMClock, "kvmclock is on"},
	{control.HyperVPage, "Hyper-V's reference time is on, by its page"},
	{control.HyperVCounter, "Hyper-V's reference time is on, by its counter"},
	{control.NoClockYet, "none that ftclock keeps yet; it runs for less than " + control.UnkeptAfter.String()},
	{control.NoClock, "none that ftclock keeps"},
	{control.ClockNotSeen, "not known before its next pause"},
	{control.ClockNotKnown, "not known: the kernel doesn't say"},
	{control.ClockOldModule, "not known: the module in QEMU is of a version that doesn't look; the next start has a new one"},
}

// GuestClock words a guest's clock.
func GuestClock(clock control.GuestClock) string {
	for _, c := range GuestClocks {
		if c.Is == clock {
			return c.Says
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
	return fmt.Sprintf("synchronised, off by at most %s", host.Nanoseconds(uint64(max(h.MaximumError, 0))))
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
	return host.OneLine(method)
}

// PausesInAll words how many pauses there were, and what was done at them.
func PausesInAll(s *control.Status) string {
	text := strconv.FormatUint(s.Pauses, 10)
	if parts := Counted(Decisions(s)); len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	return text
}

// Counter is one of a status' counts, with its name.
type Counter struct {
	Name string
	N    uint64
}

// Decisions are the pauses by what the module did with QEMU's write of the clock.
func Decisions(s *control.Status) []Counter {
	return []Counter{{"dropped", s.Dropped}, {"anchored", s.Anchored}, {"held", s.Held}, {"passed", s.Passed}}
}

// Doubts are the counts that stay zero while nothing unusual happens.
func Doubts(s *control.Status) []Counter {
	return []Counter{{"over limit", s.OverLimit}, {"anchored anew", s.Reanchored}, {"stale orders", s.StaleOrders}, {"concurrent calls", s.Busy}}
}

// Counted words the counts that aren't zero.
func Counted(all []Counter) (parts []string) {
	for _, c := range all {
		if c.N > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.N, c.Name))
		}
	}
	return parts
}

// unusual is a record's reason, unless its decision says it already.
func unusual(r clockpage.Record) string {
	why := r.Reason.String()
	switch r.Reason {
	case clockpage.NoReason, clockpage.InTolerance, clockpage.OutOfTolerance, clockpage.ByThePolicy:
		why = ""
	}
	if r.TSC == clockpage.TSCUnmoved {
		why += "; its TSC couldn't be moved with its clock"
	}
	return why
}

var hostColumn = ui.Column{Title: "HOST", Gives: true}

var statusColumns = []ui.Column{
	{Title: "DOMAIN", Gives: true}, {Title: "STATE"}, {Title: "METHOD"}, {Title: "PAUSES", Right: true}, {Title: "LOST IN ALL", Right: true},
	{Title: "LAST RESIDUAL", Right: true}, {Title: "WORST", Right: true}, {Title: "SINCE"},
}

// PrintTable prints a line for each domain, with its host if that is asked, and the remarks below.
func PrintTable(u *ui.UI, entries []Entry, hosts bool) {
	columns, rows := statusColumns, make([][]string, len(entries))
	for i, e := range entries {
		rows[i] = statusRow(e, time.Now())
	}
	if hosts {
		columns = slices.Insert(slices.Clone(columns), 0, hostColumn)
		for i, e := range entries {
			rows[i] = slices.Insert(rows[i], 0, host.OneLine(e.On))
		}
	}
	for i, line := range ui.Table(columns, rows) {
		if i > 0 {
			line = PaintState(u, line, entries[i-1])
		}
		u.Printf("%s\n", line)
	}
	for _, e := range entries {
		for _, remark := range Remarks(e) {
			u.Printf("%s: %s\n", e.Label(hosts), remark)
		}
	}
}

// PaintState colours the state. It follows two spaces, which no name has: see host.OneLine.
func PaintState(u *ui.UI, line string, e Entry) string {
	colour := StateColour(e)
	at := strings.Index(line, "  "+string(e.State)) + len("  ")
	if colour == "" || at < len("  ") {
		return line
	}
	return line[:at] + u.Paint(colour, string(e.State)) + line[at+len(e.State):]
}

// StateColour is the colour of a state; "" is none.
func StateColour(e Entry) string {
	switch {
	case e.Bad():
		return ui.Red
	case e.State == control.Correcting:
		return ui.Green
	case e.State == control.Starting:
		return ui.Yellow
	}
	return ""
}

func statusRow(e Entry, now time.Time) []string {
	name := host.OneLine(e.Name)
	if e.Mute {
		return []string{name, string(e.State), "-", "-", "-", "-", "-", "-"}
	}
	last := "-"
	if n := len(e.Records); n > 0 {
		last = host.SignedNanoseconds(e.Records[n-1].ResidualStop)
	}
	return []string{
		name, string(e.State), cmp.Or(host.OneLine(e.Method), "-"), strconv.FormatUint(e.Pauses, 10), host.Nanoseconds(e.Lost()), last, host.Nanoseconds(e.WorstResidual),
		since(e.Since, now),
	}
}

// PrintDetails prints all that is known of one domain, with its host if that is asked.
func PrintDetails(u *ui.UI, e Entry, hosts bool) {
	if hosts {
		u.Printf("%-16s %s\n", "host", host.OneLine(e.On))
	}
	state := u.Paint(StateColour(e), string(e.State))
	for _, line := range Details(e, state) {
		u.Printf("%-16s %s\n", line[0], line[1])
	}
	for _, remark := range Remarks(e) {
		u.Printf("%s\n", remark)
	}
}

// RecordColumns are the columns of RecordRow.
var RecordColumns = []ui.Column{
	{Title: "PAUSE", Right: true}, {Title: "WENT ON AT"}, {Title: "EVENT"}, {Title: "LOST", Right: true}, {Title: "DECISION"}, {Title: "BY"},
	{Title: "RESIDUAL", Right: true}, {Title: "COST", Right: true},
}

// PrintRecords prints the records of one domain, unusual ones with their reason, and its host if that is asked.
func PrintRecords(u *ui.UI, e Entry, hosts bool) {
	if len(e.Records) == 0 {
		u.Printf("%s: no pause recorded yet\n", e.Label(hosts))
		return
	}
	rows := make([][]string, len(e.Records))
	for i, r := range e.Records {
		rows[i] = RecordRow(r, time.Local)
	}
	u.Printf("%s:\n", e.Label(hosts))
	for i, line := range ui.Table(RecordColumns, rows) {
		u.Printf("%s\n", line)
		if i > 0 {
			if why := unusual(e.Records[i-1]); why != "" {
				u.Printf("  %s\n", why)
			}
		}
	}
}

// RecordRow words a record, with its time in zone.
func RecordRow(r clockpage.Record, zone *time.Location) []string {
	by := "policy"
	if r.Ordered == 1 {
		by = "order"
	}
	return []string{
		strconv.FormatUint(r.Number, 10), wallClock(r.ContReal, zone), r.Event.String(), host.SignedNanoseconds(int64(min(r.Took(), math.MaxInt64))), r.Decision.String(), by,
		host.SignedNanoseconds(r.ResidualStop), host.Nanoseconds(r.Cost),
	}
}

func wallClock(realNS uint64, zone *time.Location) string {
	if realNS == 0 || realNS > math.MaxInt64 {
		return "-"
	}
	return time.Unix(0, int64(realNS)).In(zone).Format("2006-01-02 15:04:05.000")
}

// since is a short form of a time: the time of day if it is today, else the date.
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
