package watch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"

	"ftclock/cmd/ftclock/internal/fleet"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

const (
	watchEvery   = time.Second
	watchLibvirt = 5 * time.Second  // between two questions to libvirt
	watchSilent  = 3 * time.Second  // after which a shim that doesn't answer is said not to
	watchEnded   = time.Minute      // how long a domain is shown that has ended and that libvirt doesn't tell of
	watchHistory = 10 * time.Minute // of residuals
	watchRate    = 5 * time.Second  // over which pauses are counted for the rate
)

// ended is a domain whose shim has gone in good order, as far as watch can tell.
const ended control.State = "ended"

// Run draws until the operator quits or the context ends. hosts are those of --connect.
func Run(ctx context.Context, u *ui.UI, stdin io.Reader, at status.Dirs, hosts []fleet.Host) error {
	m := &watchModel{ctx: ctx, ui: u, dirs: at, domains: map[string]*watched{}, ascii: !utf8Locale(os.Getenv), width: 80, height: 24}
	m.setHosts(hosts)
	restore, err := quietStderr(u.Stderr)
	if err != nil {
		return err
	}
	_, err = tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(stdin), tea.WithOutput(u.Stdout), tea.WithoutSignalHandler()).Run()
	restore(err != nil && ctx.Err() == nil)
	if ctx.Err() != nil {
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
	fd, err := host.MemoryFile("stderr")
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
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
	ctx           context.Context
	ui            *ui.UI
	here          *watchedHost // this host, or nil if it isn't shown
	others        []*watchedHost
	dirs          status.Dirs
	ascii         bool // the terminal has no other characters
	width, height int

	domains   map[string]*watched     // by UUID; those of other hosts by host and UUID
	known     map[string]status.Known // libvirt's; nil: it can't be asked
	libvirt   string                  // why it can't
	asking    bool                    // libvirt
	asked     time.Time
	unlisted  string // what control.List had to say
	now       time.Time
	selected  string // key in domains
	top       int    // the first line in sight
	inDetails bool
	scroll    int   // of the details
	failed    error // why it can't go on
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
		entry status.Entry
		err   error
		at    time.Time
	}
	libvirtAnswered struct {
		known map[string]status.Known
		err   error
	}
)

// Init starts the first tick, as tea.Model wants it.
func (m *watchModel) Init() tea.Cmd {
	return func() tea.Msg { return watchTick(time.Now()) }
}

// Update takes a message into the model.
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
	case hostAnswered:
		m.hostAnswered(msg)
	case libvirtAnswered:
		m.asking, m.asked = false, m.now
		m.known, m.libvirt = msg.known, ""
		if msg.err != nil {
			m.libvirt = ui.ErrorText(msg.err)
		}
		m.addUnserved()
	}
	return m, nil
}

// ask looks for shims, and asks libvirt and other hosts now and then. Nothing is waited for.
func (m *watchModel) ask() tea.Cmd {
	others := m.askOthers()
	if m.here == nil {
		return others
	}
	return tea.Batch(others, m.askHere())
}

func (m *watchModel) askHere() tea.Cmd {
	list := func() tea.Msg {
		infos, err := control.List(m.dirs.Shims)
		return shimsListed{infos, err}
	}
	if m.asking || m.now.Sub(m.asked) < watchLibvirt {
		return list
	}
	m.asking = true
	uri := m.here.URI
	return tea.Batch(list, func() tea.Msg {
		h, err := hypervisor.Connect(uri)
		if err != nil {
			return libvirtAnswered{nil, err}
		}
		defer h.Close()
		known, err := m.dirs.Managed(h, func(status.Known) bool { return false }, func(string, ...any) {})
		return libvirtAnswered{known, err}
	})
}

// listed takes the shims that there are, and asks each that has answered its last question.
func (m *watchModel) listed(msg shimsListed) tea.Cmd {
	m.unlisted = ""
	if msg.err != nil {
		m.unlisted = ui.ErrorText(msg.err)
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
			e, err := m.dirs.Entry(info, known, status.MaxRecords)
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
			d.entry = status.Entry{Mute: true, Status: control.Status{Name: d.info.Name, UUID: uuid, State: ended, Why: "its shim has ended with it"}}
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
		d = &watched{host: m.here, entry: status.Entry{Mute: true, Status: control.Status{State: control.Starting}}}
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
			d.entry, d.info, d.left = m.dirs.WithoutShim(f), control.Info{}, time.Time{}
		}
	}
	for uuid, d := range m.domains {
		if _, ok := m.known[uuid]; !ok && d.info.UUID == "" && d.host == m.here {
			delete(m.domains, uuid)
		}
	}
}

// order is the domains by host, as the command line has them, and name.
func (m *watchModel) order() []string {
	return slices.SortedFunc(maps.Keys(m.domains), func(a, b string) int {
		x, y := m.domains[a], m.domains[b]
		return cmp.Or(cmp.Compare(x.host.place, y.host.place), strings.Compare(x.entry.Name, y.entry.Name), strings.Compare(a, b))
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
