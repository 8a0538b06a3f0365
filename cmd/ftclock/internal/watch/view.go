package watch

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

// View draws the screen.
func (m *watchModel) View() tea.View {
	lines := m.lines()
	for i, line := range lines {
		lines[i] = ansi.Truncate(line, m.width, "…")
	}
	text := strings.Join(lines[:min(len(lines), m.height)], "\n")
	if m.ascii {
		text = asciiOnly.Replace(text)
	}
	v := tea.NewView(text)
	v.AltScreen = true
	return v
}

// lines are the lines of the screen, from the top.
func (m *watchModel) lines() []string {
	order := m.order()
	if m.inDetails && m.domains[m.selected] == nil {
		m.inDetails = false // the domain has gone
	}
	head := m.heading(order)
	var body, foot []string
	if m.inDetails {
		foot = []string{"q quit   ↑↓ scroll   esc back"}
		body = m.details(m.domains[m.selected])
		room := max(m.height-len(foot)-2, 1)
		m.scroll = min(m.scroll, max(len(body)-room, 0))
		if more := len(body) - m.scroll - room; more > 0 {
			foot[0] += fmt.Sprintf("   (%s below)", ui.Count(uint64(more), "line"))
		}
		body = body[m.scroll:]
	} else {
		foot = []string{scale, "q quit   ↑↓ select   enter details"}
		if remark := m.remark(order); remark != "" {
			foot = append([]string{remark}, foot...)
		}
		room := max(m.height-len(foot)-3, 1)
		at := m.at(order)
		m.top = max(min(m.top, at, len(order)-room), at-room+1, 0)
		if more := len(order) - m.top - room; more > 0 {
			foot[len(foot)-1] += fmt.Sprintf("   (%s below)", ui.Count(uint64(more), "domain"))
		}
		body = m.table(order, room)
	}
	room := max(m.height-len(foot)-1, 0)
	body = body[:min(len(body), room)]
	all := append([]string{head}, body...)
	for len(all) < m.height-len(foot) {
		all = append(all, "")
	}
	return append(all, foot...)
}

// heading is the first line: how many domains there are, and how many with a problem.
func (m *watchModel) heading(order []string) string {
	bad, domains := 0, 0
	for _, uuid := range order {
		e := m.domains[uuid].shown(m.now)
		if e.Bad() {
			bad++
		}
		if e.State != status.Unreachable {
			domains++
		}
	}
	text := ui.Count(uint64(domains), "domain")
	if m.many() {
		hosts := len(m.others)
		if m.here != nil {
			hosts++
		}
		text += " on " + ui.Count(uint64(hosts), "host")
	}
	switch {
	case m.waiting() > 0:
		text += fmt.Sprintf(", %d not heard of yet", m.waiting())
	case len(order) == 0:
		text = "no domain is enabled"
	case bad > 0:
		text += ", " + m.ui.Paint(ui.Red, fmt.Sprintf("%d with a problem", bad))
	default:
		text += ", " + m.ui.Paint(ui.Green, "no problem")
	}
	left := "ftclock watch   " + text
	right := m.now.Format("15:04:05 MST")
	return left + strings.Repeat(" ", max(m.width-ansi.StringWidth(left)-len(right), 3)) + right
}

// remark is the first one of the selected domain, or else about what couldn't be read.
func (m *watchModel) remark(order []string) string {
	if len(order) > 0 {
		d := m.domains[order[m.at(order)]]
		e := d.shown(m.now)
		e.On = d.host.Name
		if all := status.Remarks(e); len(all) > 0 {
			return e.Label(m.many()) + ": " + all[0]
		}
	}
	switch {
	case m.unlisted != "":
		return "warning: " + m.unlisted
	case m.libvirt != "":
		return "libvirt can't be asked, only domains with a shim are shown: " + m.libvirt
	}
	return ""
}

func (m *watchModel) table(order []string, room int) []string {
	on := m.hostColumn()
	rest := wideRest + ansi.StringWidth(on("HOST"))
	longest := len("DOMAIN")
	for _, uuid := range order {
		longest = max(longest, ansi.StringWidth(host.OneLine(m.domains[uuid].entry.Name)))
	}
	wideName := min(longest, max((m.width-rest)*2/5, 6))
	seconds := min(max(m.width-rest-wideName, 1), int(watchHistory/time.Second))
	row := func(mark, name, state, rate, last, worst, line string) string {
		return mark + fit(name, wideName) + "  " + fit(state, wideState) + "  " + fitRight(rate, wideRate) + "  " + fitRight(last, wideTime) + "  " +
			fitRight(worst, wideTime) + "  " + line
	}
	lines := []string{"", row("  "+on("HOST"), "DOMAIN", "STATE", "PAUSES/S", "LAST", "WORST", fmt.Sprintf("RESIDUAL, %d s", seconds))}
	at := m.at(order)
	for i := m.top; i < min(len(order), m.top+room); i++ {
		d := m.domains[order[i]]
		e := d.shown(m.now)
		mark := "  "
		if i == at {
			mark = "▸ "
		}
		rate, last, worst := "-", "-", "-"
		if !e.Mute {
			rate, worst = d.rate(), host.Nanoseconds(e.WorstResidual)
			if n := len(e.Records); n > 0 {
				last = host.SignedNanoseconds(e.Records[n-1].ResidualStop)
			}
		}
		line := d.sparkline(m.now, seconds)
		if e.Mute && e.State != status.Unknown && e.State != status.Gone {
			line = "" // no shim, so no pauses
		}
		text := row(mark+on(d.host.Name), cmp.Or(host.OneLine(e.Name), "-"), string(e.State), rate, last, worst, line)
		lines = append(lines, status.PaintState(m.ui, text, e))
	}
	return lines
}

// hostColumn lays out the name of a host, with the gap that follows it; nothing where hosts aren't shown.
func (m *watchModel) hostColumn() func(string) string {
	if !m.many() {
		return func(string) string { return "" }
	}
	longest := len("HOST")
	for _, h := range m.others {
		longest = max(longest, ansi.StringWidth(host.OneLine(h.Name)))
	}
	if m.here != nil {
		longest = max(longest, ansi.StringWidth(host.OneLine(m.here.Name)))
	}
	wide := min(longest, max((m.width-wideRest)/3, 6))
	return func(name string) string { return fit(host.OneLine(name), wide) + "  " }
}

// details is all that is known of a domain, as status has it, and its last pauses, newest first.
func (m *watchModel) details(d *watched) []string {
	e := d.shown(m.now)
	state := m.ui.Paint(status.StateColour(e), string(e.State))
	lines := []string{""}
	if m.many() {
		lines = append(lines, fmt.Sprintf("%-16s %s", "host", host.OneLine(d.host.Name)))
	}
	if !e.Mute {
		lines = append(lines, fmt.Sprintf("%-16s %s", "residual", d.sparkline(m.now, min(max(m.width-17, 1), int(watchHistory/time.Second)))),
			fmt.Sprintf("%-16s %s", "pauses a second", d.rate()))
	}
	for _, line := range status.Details(e, state) {
		lines = append(lines, fmt.Sprintf("%-16s %s", line[0], line[1]))
	}
	lines = append(lines, m.wrapped(status.Remarks(e))...)
	if e.Mute {
		return lines
	}
	rows := make([][]string, 0, len(e.Records))
	for _, r := range slices.Backward(e.Records) {
		row := status.RecordRow(r, time.Local)
		row[1] = row[1][max(len(row[1])-len("15:04:05.000"), 0):]
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return append(lines, "no pause recorded yet")
	}
	return append(append(lines, ""), ui.Table(status.RecordColumns, rows)...)
}

func (m *watchModel) wrapped(texts []string) (lines []string) {
	for _, text := range texts {
		lines = append(lines, strings.Split(ansi.Wordwrap(text, max(m.width, 10), ""), "\n")...)
	}
	return lines
}

// asciiOnly replaces what a terminal without UTF-8 can't show.
var asciiOnly = strings.NewReplacer("▁", "_", "▂", ".", "▃", "-", "▄", "=", "▅", "+", "▆", "*", "▇", "%", "█", "#", "·", "?", "▸", ">",
	"µ", "u", "±", "+-", "…", "~", "↑↓", "up/down")

// Widths of the table's columns. The rest is the name's and the sparkline's.
const (
	wideState = 11
	wideRate  = 8
	wideTime  = 8
	wideRest  = 2 + 2 + wideState + 2 + wideRate + 2 + wideTime + 2 + wideTime + 2
)

// fit truncates or pads text to a width in columns.
func fit(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return text + strings.Repeat(" ", width-ansi.StringWidth(text))
}

func fitRight(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return strings.Repeat(" ", width-ansi.StringWidth(text)) + text
}

// watched is a domain, with its history since watch began.
type watched struct {
	host    *watchedHost
	info    control.Info
	entry   status.Entry
	asking  bool
	since   time.Time // of the question that is open
	left    time.Time // when its directory was found gone
	seen    uint64    // number of the newest pause
	heard   time.Time // the last answer
	columns map[int64]uint64
	knownTo map[int64]bool // seconds of which all pauses are known
	counts  []pauseCount   // oldest first
}

// pauseCount is how many pauses there were at a moment.
type pauseCount struct {
	at     time.Time
	pauses uint64
}

// forget clears the history: the next answer is of another QEMU or another shim.
func (d *watched) forget() {
	d.seen, d.heard, d.counts = 0, time.Time{}, nil
	d.columns, d.knownTo = map[int64]uint64{}, map[int64]bool{}
}

// answered takes a shim's answer into the history.
func (d *watched) answered(a shimAnswered) {
	d.asking = false
	if !d.left.IsZero() {
		return // its directory went in the meantime
	}
	d.entry = a.entry
	if a.err != nil {
		d.entry = status.Entry{Mute: true, Status: control.Status{Name: d.info.Name, UUID: d.info.UUID, State: status.Unknown, Why: ui.ErrorText(a.err)}}
	}
	if d.entry.Mute {
		d.heard, d.counts = time.Time{}, nil
		return
	}
	if a.entry.Pauses < d.seen {
		d.forget()
	}
	records := a.entry.Records
	for _, r := range records {
		// What is further in the future is no pause's, and would never be forgotten.
		if second := int64(r.ContReal / 1e9); r.Number > d.seen && second <= a.at.Unix()+60 {
			d.columns[second] = max(d.columns[second], magnitude(r.ResidualStop))
		}
	}
	from := d.heard
	switch {
	case !from.IsZero() && (a.entry.Pauses == d.seen || len(records) > 0 && records[0].Number <= d.seen+1):
	case a.entry.Pauses == uint64(len(records)):
		from = a.entry.Since
	case len(records) > 0:
		from = time.Unix(int64(records[0].ContReal/1e9)+1, 0) // of its own second some may be missing
	default:
		from = a.at
	}
	oldest := a.at.Add(-watchHistory).Unix()
	for second := max(from.Unix(), oldest); second <= a.at.Unix(); second++ {
		d.knownTo[second] = true
	}
	maps.DeleteFunc(d.columns, func(second int64, _ uint64) bool { return second < oldest })
	maps.DeleteFunc(d.knownTo, func(second int64, _ bool) bool { return second < oldest })
	d.seen, d.heard = a.entry.Pauses, a.at
	d.counts = append(d.counts, pauseCount{a.at, a.entry.Pauses})
	for len(d.counts) > 2 && a.at.Sub(d.counts[1].at) >= watchRate {
		d.counts = d.counts[1:]
	}
}

// rate is in pauses a second.
func (d *watched) rate() string {
	if len(d.counts) < 2 {
		return "-"
	}
	first, last := d.counts[0], d.counts[len(d.counts)-1]
	return strconv.FormatFloat(float64(last.pauses-first.pauses)/last.at.Sub(first.at).Seconds(), 'f', 1, 64)
}

// shown is the entry, unless its shim is silent.
func (d *watched) shown(now time.Time) status.Entry {
	if d.asking && now.Sub(d.since) > watchSilent {
		return status.Entry{Mute: true, Status: control.Status{Name: d.info.Name, UUID: d.info.UUID, State: status.Unknown,
			Why: fmt.Sprintf("its shim hasn't answered for %d s; is it stopped, or the host overloaded?", int(now.Sub(d.since).Seconds()))}}
	}
	if e := d.silent(now); e != nil {
		return *e
	}
	return d.entry
}

// sparkline draws the last seconds, one column each.
func (d *watched) sparkline(now time.Time, seconds int) string {
	line := make([]rune, 0, seconds)
	for second := now.Unix() - int64(seconds) + 1; second <= now.Unix(); second++ {
		worst, any := d.columns[second]
		switch {
		case any:
			i := slices.IndexFunc(bars, func(b struct {
				rune rune
				upTo uint64
			}) bool {
				return worst <= b.upTo
			})
			line = append(line, bars[i].rune)
		case d.knownTo[second] || second == now.Unix():
			line = append(line, noPause)
		default:
			line = append(line, notKnown)
		}
	}
	return string(line)
}

func magnitude(v int64) uint64 {
	if v < 0 {
		return uint64(-(v + 1)) + 1
	}
	return uint64(v)
}

// bars are the heights of the sparkline, with what each doesn't exceed, in ns. One scale for all domains: they are compared at a
// glance, and the full height is what RTS 25 doesn't allow.
var bars = []struct {
	rune rune
	upTo uint64
}{
	{'▁', 100}, {'▂', 300}, {'▃', 1_000}, {'▄', 3_000}, {'▅', 10_000}, {'▆', 30_000}, {'▇', 100_000}, {'█', 1<<64 - 1},
}

const (
	noPause  = ' '
	notKnown = '·'
	scale    = "worst of a second: ▁ to 0.1 µs  ▃ 1 µs  ▅ 10 µs  ▇ 100 µs  █ more  · not known"
)
