package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
	"golang.org/x/sys/unix"

	"ftclock/control"
	machine "ftclock/host"
)

type watchCmd struct{}

func (watchCmd) Help() string {
	return "Refreshed once a second; the keys are shown at the bottom. Each column of the residual is a second, the newest at the right, and its height the " +
		"worst of that second's pauses. It needs no libvirt, only shows more with it, and must be root to ask the shims."
}

const (
	watchEvery   = time.Second
	watchLibvirt = 5 * time.Second  // between two questions to libvirt
	watchSilent  = 3 * time.Second  // after which a shim that doesn't answer is said not to
	watchEnded   = time.Minute      // how long a domain is shown that has ended and that libvirt doesn't tell of
	watchHistory = 10 * time.Minute // of residuals
	watchRate    = 5 * time.Second  // over which pauses are counted for the rate
	watchRing    = 256              // records that a module keeps
)

// ended is a domain whose shim has gone in good order, as far as watch can tell.
const ended control.State = "ended"

func (watchCmd) Run(p *program) error {
	if !isTerminal(p.stdout) || os.Getenv("TERM") == "dumb" {
		return hinted(errors.New("watch draws on a terminal, and there is none"), "`ftclock status` prints the same once")
	}
	if _, err := control.List(shims); errors.Is(err, os.ErrPermission) {
		return hinted(err, "run it as root")
	}
	m := &watchModel{ui: p.ui, uri: p.uri, domains: map[string]*watched{}, ascii: !utf8Locale(os.Getenv), width: 80, height: 24}
	restore, err := quietStderr(p.stderr)
	if err != nil {
		return err
	}
	_, err = tea.NewProgram(m, tea.WithContext(p.ctx), tea.WithInput(p.stdin), tea.WithOutput(p.stdout), tea.WithoutSignalHandler()).Run()
	restore(err != nil && p.ctx.Err() == nil)
	if p.ctx.Err() != nil {
		return nil // ended by a signal, which is how a terminal that goes away says it
	}
	if err != nil {
		return fmt.Errorf("drawing on the terminal: %w", err)
	}
	return m.failed
}

// quietStderr keeps what libraries write to the standard error (libxml2 does, in libvirt) from the screen. restore ends it, and
// shows what there was if it is asked to.
func quietStderr(stderr io.Writer) (restore func(show bool), err error) {
	if stderr != os.Stderr {
		return func(bool) {}, nil
	}
	fd, err := machine.MemoryFile("stderr")
	if err != nil {
		return nil, err
	}
	aside := os.NewFile(uintptr(fd), "stderr")
	real, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		err = unix.Dup3(fd, 2, 0)
	}
	if err != nil {
		aside.Close()
		return nil, os.NewSyscallError("dup", err)
	}
	return func(show bool) {
		_ = unix.Dup3(real, 2, 0)
		unix.Close(real)
		if _, err := aside.Seek(0, io.SeekStart); err == nil && show {
			_, _ = io.Copy(stderr, aside)
		}
		aside.Close()
	}, nil
}

// utf8Locale is what the C library makes of the environment.
func utf8Locale(getenv func(string) string) bool {
	locale := cmp.Or(getenv("LC_ALL"), getenv("LC_CTYPE"), getenv("LANG"))
	locale = strings.ToLower(strings.ReplaceAll(locale, "-", ""))
	return strings.Contains(locale, "utf8")
}

// watchModel is what is on the screen. Only Update changes it, on one goroutine.
type watchModel struct {
	ui            *ui
	uri           string
	ascii         bool // the terminal has no other characters
	width, height int

	domains   map[string]*watched // by UUID
	known     map[string]found    // libvirt's; nil: it can't be asked
	libvirt   string              // why it can't
	asking    bool                // libvirt
	asked     time.Time
	unlisted  string // what control.List had to say
	now       time.Time
	selected  string // UUID
	top       int    // the first line in sight
	inDetails bool
	scroll    int   // of the details
	failed    error // why it can't go on
}

// watched is a domain, and what was seen of it since watch began.
type watched struct {
	info    control.Info
	entry   entry
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

// Messages to Update.
type (
	watchTick   time.Time
	shimsListed struct {
		infos []control.Info
		err   error
	}
	shimAnswered struct {
		uuid  string
		entry entry
		err   error
		at    time.Time
	}
	libvirtAnswered struct {
		known map[string]found
		err   error
	}
)

func (m *watchModel) Init() tea.Cmd {
	return func() tea.Msg { return watchTick(time.Now()) }
}

func (m *watchModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tea.KeyPressMsg:
		return m, m.key(msg.String())
	case watchTick:
		m.now = time.Time(msg)
		return m, tea.Batch(m.ask(), tea.Tick(watchEvery, func(t time.Time) tea.Msg { return watchTick(t) }))
	case shimsListed:
		return m, m.listed(msg)
	case shimAnswered:
		if errors.Is(msg.err, os.ErrPermission) {
			m.failed = msg.err
			return m, tea.Quit
		}
		if d := m.domains[msg.uuid]; d != nil {
			d.answered(msg)
		}
	case libvirtAnswered:
		m.asking, m.asked = false, m.now
		m.known, m.libvirt = msg.known, ""
		if msg.err != nil {
			m.libvirt = sayError(msg.err)
		}
		m.addUnserved()
	}
	return m, nil
}

// ask looks for shims, and asks libvirt now and then. Neither is waited for.
func (m *watchModel) ask() tea.Cmd {
	list := func() tea.Msg {
		infos, err := control.List(shims)
		return shimsListed{infos, err}
	}
	if m.asking || m.now.Sub(m.asked) < watchLibvirt {
		return list
	}
	m.asking = true
	uri := m.uri
	return tea.Batch(list, func() tea.Msg {
		known, err := (&statusCmd{}).askLibvirt(uri, func(string, ...any) {})
		return libvirtAnswered{known, err}
	})
}

// listed takes the shims that there are, and asks each that has answered its last question.
func (m *watchModel) listed(msg shimsListed) tea.Cmd {
	m.unlisted = ""
	if msg.err != nil {
		m.unlisted = sayError(msg.err)
	}
	here := map[string]bool{}
	var all []tea.Cmd
	for _, info := range msg.infos {
		here[info.UUID] = true
		d := m.domain(info.UUID)
		d.info, d.left = info, time.Time{}
		d.entry.Name, d.entry.UUID = info.Name, info.UUID
		if d.asking {
			continue
		}
		d.asking, d.since = true, m.now
		known := m.known
		all = append(all, func() tea.Msg {
			e, err := askShim(info, known, watchRing)
			return shimAnswered{info.UUID, e, err, time.Now()}
		})
	}
	for uuid, d := range m.domains {
		if here[uuid] || d.info.UUID == "" {
			continue
		}
		if d.left.IsZero() {
			d.left = m.now
			d.forget()
			d.entry = entry{mute: true, Status: control.Status{Name: d.info.Name, UUID: uuid, State: ended, Why: "its shim has ended with it"}}
		}
		if m.now.Sub(d.left) > watchEnded {
			delete(m.domains, uuid)
		}
	}
	m.addUnserved()
	return tea.Batch(all...)
}

func (m *watchModel) domain(uuid string) *watched {
	d := m.domains[uuid]
	if d == nil {
		d = &watched{entry: entry{mute: true, Status: control.Status{State: control.Starting}}}
		d.forget()
		m.domains[uuid] = d
	}
	return d
}

// addUnserved adds the domains that libvirt tells of and that have no shim.
func (m *watchModel) addUnserved() {
	for uuid, f := range m.known {
		if d := m.domains[uuid]; d == nil || d.info.UUID == "" || !d.left.IsZero() {
			d = m.domain(uuid)
			d.entry, d.info, d.left = withoutShim(f), control.Info{}, time.Time{}
		}
	}
	for uuid, d := range m.domains {
		if _, ok := m.known[uuid]; !ok && d.info.UUID == "" {
			delete(m.domains, uuid)
		}
	}
}

// forget begins anew: the next answer is of another QEMU, or of another shim.
func (d *watched) forget() {
	d.seen, d.heard, d.counts = 0, time.Time{}, nil
	d.columns, d.knownTo = map[int64]uint64{}, map[int64]bool{}
}

// answered takes what a shim said.
func (d *watched) answered(a shimAnswered) {
	d.asking = false
	if !d.left.IsZero() {
		return // its directory went in the meantime
	}
	d.entry = a.entry
	if a.err != nil {
		d.entry = entry{mute: true, Status: control.Status{Name: d.info.Name, UUID: d.info.UUID, State: unknown, Why: sayError(a.err)}}
	}
	if d.entry.mute {
		d.heard, d.counts = time.Time{}, nil
		return
	}
	if a.entry.Pauses < d.seen {
		d.forget()
	}
	records := a.entry.Records
	for _, r := range records {
		if second := int64(r.ContReal / 1e9); r.Number > d.seen {
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

func magnitude(v int64) uint64 {
	if v < 0 {
		return uint64(-(v + 1)) + 1
	}
	return uint64(v)
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
func (d *watched) shown(now time.Time) entry {
	if d.asking && now.Sub(d.since) > watchSilent {
		return entry{mute: true, Status: control.Status{Name: d.info.Name, UUID: d.info.UUID, State: unknown,
			Why: fmt.Sprintf("its shim hasn't answered for %d s; is it stopped, or the host overloaded?", int(now.Sub(d.since).Seconds()))}}
	}
	return d.entry
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

// sparkline shows so many seconds up to now.
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

// order is the domains by name.
func (m *watchModel) order() []string {
	return slices.SortedFunc(maps.Keys(m.domains), func(a, b string) int {
		return cmp.Or(strings.Compare(m.domains[a].entry.Name, m.domains[b].entry.Name), strings.Compare(a, b))
	})
}

// at is the place of the selected domain in the order; 0 if there is none.
func (m *watchModel) at(order []string) int { return max(slices.Index(order, m.selected), 0) }

func (m *watchModel) key(name string) tea.Cmd {
	order := m.order()
	move := func(by int) {
		if m.inDetails {
			m.scroll = max(m.scroll+by, 0)
			return
		}
		if len(order) > 0 {
			m.selected = order[min(max(m.at(order)+by, 0), len(order)-1)]
		}
	}
	page := max(m.height-6, 1)
	switch name {
	case "q", "Q", "ctrl+c":
		return tea.Quit
	case "ctrl+z":
		return tea.Suspend
	case "up", "k":
		move(-1)
	case "down", "j":
		move(1)
	case "pgup":
		move(-page)
	case "pgdown":
		move(page)
	case "home", "g":
		move(-1 << 20)
	case "end", "G":
		move(1 << 20)
	case "enter":
		if len(order) > 0 {
			m.selected = order[m.at(order)]
			m.inDetails, m.scroll = !m.inDetails, 0
		}
	case "esc", "backspace", "left", "h":
		m.inDetails = false
	}
	return nil
}

// View draws all.
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

// asciiOnly is for terminals that have no more.
var asciiOnly = strings.NewReplacer("▁", "_", "▂", ".", "▃", "-", "▄", "=", "▅", "+", "▆", "*", "▇", "%", "█", "#", "·", "?", "▸", ">",
	"µ", "u", "±", "+-", "…", "~", "↑↓", "up/down")

// lines are the screen's, from the top.
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
			foot[0] += fmt.Sprintf("   (%s below)", count(uint64(more), "line"))
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
			foot[len(foot)-1] += fmt.Sprintf("   (%s below)", count(uint64(more), "domain"))
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

// heading says the worst of all in the first line.
func (m *watchModel) heading(order []string) string {
	bad := 0
	for _, uuid := range order {
		if m.domains[uuid].shown(m.now).bad() {
			bad++
		}
	}
	text := count(uint64(len(order)), "domain")
	switch {
	case len(order) == 0:
		text = "no domain is enabled"
	case bad > 0:
		text += ", " + m.ui.paint(red, fmt.Sprintf("%d with a problem", bad))
	default:
		text += ", " + m.ui.paint(green, "no problem")
	}
	left := "ftclock watch   " + text
	right := m.now.Format("15:04:05 MST")
	return left + strings.Repeat(" ", max(m.width-ansi.StringWidth(left)-len(right), 3)) + right
}

// remark is about the selected domain, or else about what couldn't be asked.
func (m *watchModel) remark(order []string) string {
	if len(order) > 0 {
		e := m.domains[order[m.at(order)]].shown(m.now)
		if all := remarks(e); len(all) > 0 {
			return oneLine(e.Name) + ": " + all[0]
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

// Widths of the table's columns. The rest is the name's and the sparkline's.
const (
	wideState = 11
	wideRate  = 8
	wideTime  = 8
	wideRest  = 2 + 2 + wideState + 2 + wideRate + 2 + wideTime + 2 + wideTime + 2
)

func (m *watchModel) table(order []string, room int) []string {
	longest := len("DOMAIN")
	for _, uuid := range order {
		longest = max(longest, ansi.StringWidth(oneLine(m.domains[uuid].entry.Name)))
	}
	wideName := min(longest, max((m.width-wideRest)*2/5, 6))
	seconds := min(max(m.width-wideRest-wideName, 1), int(watchHistory/time.Second))
	row := func(mark, name, state, rate, last, worst, line string) string {
		return mark + fit(name, wideName) + "  " + fit(state, wideState) + "  " + fitRight(rate, wideRate) + "  " + fitRight(last, wideTime) + "  " +
			fitRight(worst, wideTime) + "  " + line
	}
	lines := []string{"", row("  ", "DOMAIN", "STATE", "PAUSES/S", "LAST", "WORST", fmt.Sprintf("RESIDUAL, %d s", seconds))}
	at := m.at(order)
	for i := m.top; i < min(len(order), m.top+room); i++ {
		d := m.domains[order[i]]
		e := d.shown(m.now)
		mark := "  "
		if i == at {
			mark = "▸ "
		}
		rate, last, worst := "-", "-", "-"
		if !e.mute {
			rate, worst = d.rate(), sayNS(e.WorstResidual)
			if n := len(e.Records); n > 0 {
				last = signedNS(e.Records[n-1].ResidualStop)
			}
		}
		line := d.sparkline(m.now, seconds)
		if e.mute && e.State != unknown && e.State != gone {
			line = "" // there is nothing to be known
		}
		text := row(mark, oneLine(e.Name), string(e.State), rate, last, worst, line)
		lines = append(lines, m.ui.paintState(text, e))
	}
	return lines
}

// fit makes text as wide as that.
func fit(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return text + strings.Repeat(" ", width-ansi.StringWidth(text))
}

func fitRight(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return strings.Repeat(" ", width-ansi.StringWidth(text)) + text
}

// details is all that is known of a domain, as status has it, and its last pauses, newest first.
func (m *watchModel) details(d *watched) []string {
	e := d.shown(m.now)
	state := m.ui.paint(stateColour(e), string(e.State))
	lines := []string{""}
	if e.mute {
		lines = append(lines, fmt.Sprintf("%-16s %s", "domain", oneLine(e.Name)), fmt.Sprintf("%-16s %s", "uuid", oneLine(e.UUID)),
			fmt.Sprintf("%-16s %s", "state", state))
		return append(lines, m.wrapped(remarks(e))...)
	}
	lines = append(lines, fmt.Sprintf("%-16s %s", "residual", d.sparkline(m.now, min(max(m.width-17, 1), int(watchHistory/time.Second)))),
		fmt.Sprintf("%-16s %s", "pauses a second", d.rate()))
	for _, line := range details(e, state) {
		lines = append(lines, fmt.Sprintf("%-16s %s", line[0], line[1]))
	}
	lines = append(lines, m.wrapped(remarks(e))...)
	rows := make([][]string, 0, len(e.Records))
	for _, r := range slices.Backward(e.Records) {
		row := recordRow(r, time.Local)
		row[1] = row[1][max(len(row[1])-len("15:04:05.000"), 0):]
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return append(lines, "no pause recorded yet")
	}
	return append(append(lines, ""), layTable(recordColumns, rows)...)
}

func (m *watchModel) wrapped(texts []string) (lines []string) {
	for _, text := range texts {
		lines = append(lines, strings.Split(ansi.Wordwrap(text, max(m.width, 10), ""), "\n")...)
	}
	return lines
}
