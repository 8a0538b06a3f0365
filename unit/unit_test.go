package unit

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"ftclock/spawn"
	"ftclock/test/hang"
)

const id = "6695eb01-f6a4-8304-79aa-97f2502e193f"

var options = spawn.Spec{UUID: id, Name: "a", PID: 4711}

// manager is a fake of systemd: each start of a unit is answered by the next of its steps. test/systemd has the real one.
type manager struct {
	t      *testing.T
	steps  []func() (result string, err error)
	starts int
	kills  int
	pid    uint32 // of the unit's main process
	silent bool
}

func (m *manager) StartUnitContext(_ context.Context, name, _ string, result chan<- string) (int, error) {
	if name != "ftclock-shim@"+id+".service" {
		m.t.Errorf("unit %s", name)
	}
	step := m.steps[min(m.starts, len(m.steps)-1)]
	m.starts++
	answer, err := step()
	if answer != "" {
		result <- answer
	}
	return m.starts, err
}

func (m *manager) KillUnitContext(context.Context, string, int32) { m.kills++ }

func (m *manager) GetUnitPropertyContext(context.Context, string, string) (*systemd.Property, error) {
	state := "deactivating"
	if m.kills > 1 {
		state = "failed"
	}
	return &systemd.Property{Name: "ActiveState", Value: dbus.MakeVariant(state)}, nil
}

func (m *manager) GetServicePropertyContext(context.Context, string, string) (*systemd.Property, error) {
	if m.silent {
		return nil, errors.New("no answer")
	}
	return &systemd.Property{Name: "MainPID", Value: dbus.MakeVariant(m.pid)}, nil
}

func (m *manager) Close() {}

func TestTheWay(t *testing.T) {
	refused := errors.New("no such luck")
	for name, c := range map[string]struct {
		absent  bool // systemd
		connect error
		steps   []string // result or error's name, and whether the order is taken
		refusal error

		direct, note bool
		err          string
		starts       int
		killed       bool
		expires      bool // there is no result before the time is up
		pid          uint32
		silent       bool
	}{
		"no systemd":               {absent: true, direct: true},
		"no bus":                   {connect: refused, direct: true, note: true},
		"a unit":                   {steps: []string{"taken done"}, starts: 1},
		"no unit":                  {steps: []string{"error org.freedesktop.systemd1.NoSuchUnit"}, starts: 1, direct: true},
		"a masked unit":            {steps: []string{"error org.freedesktop.systemd1.UnitMasked"}, starts: 1, direct: true, note: true, killed: true},
		"no sandbox":               {steps: []string{"failed"}, starts: 3, direct: true, note: true, killed: true},
		"the last run's unit":      {steps: []string{"done", "done", "taken done"}, starts: 3},
		"a shim that refuses":      {steps: []string{"failed"}, refusal: refused, starts: 1, err: "no such luck (in ", killed: true},
		"a shim that is killed":    {steps: []string{"failed", "failed", "taken done"}, starts: 3},
		"a shim that is late":      {steps: []string{"taken failed"}, starts: 1},
		"a bus that dies":          {steps: []string{"error org.freedesktop.DBus.Error.NoReply"}, starts: 1, direct: true, note: true, killed: true},
		"a shim that isn't ready":  {steps: []string{""}, pid: 4711, starts: 1, err: "wasn't ready in time (in ", killed: true, expires: true},
		"a systemd that is busy":   {steps: []string{""}, starts: 1, direct: true, note: true, expires: true},
		"a systemd that is silent": {steps: []string{""}, silent: true, starts: 1, direct: true, note: true, expires: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			m := &manager{t: t, pid: c.pid, silent: c.silent}
			h := Host{Booted: root, State: filepath.Join(root, "s"), LastStops: filepath.Join(root, "l")}
			if c.absent {
				h.Booted = filepath.Join(root, "none")
			}
			for _, step := range c.steps {
				m.steps = append(m.steps, func() (string, error) {
					rest, taken := strings.CutPrefix(step, "taken")
					if o, err := spawn.Read(h.State, id); err != nil || o != options {
						t.Errorf("the order: %+v, %v", o, err)
					}
					if c.refusal != nil {
						spawn.Refuse(h.State, id, c.refusal)
					}
					if taken {
						spawn.Take(h.State, id)
					}
					rest = strings.TrimSpace(rest)
					if name, isError := strings.CutPrefix(rest, "error "); isError {
						return "", dbus.Error{Name: name}
					}
					return rest, nil
				})
			}
			direct, note := false, ""
			h.Connect = func(context.Context) (Manager, error) { return m, c.connect }
			h.Direct = func(_ context.Context, _ string, o spawn.Spec) error {
				if spawn.Waiting(h.State, id) {
					t.Error("started while systemd may start it, too")
				}
				direct = o == options
				return nil
			}
			h.Note = func(_, warning string) { note += warning }
			length := 10 * time.Second
			if c.expires {
				length = time.Second
			}
			ctx, cancel := context.WithTimeout(context.Background(), length)
			defer cancel()
			err := h.Start(ctx, options)
			if direct != c.direct || (note != "") != c.note || m.starts != c.starts || (m.kills > 0) != c.killed {
				t.Errorf("direct %v, note %q, %d starts, %d kills", direct, note, m.starts, m.kills)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err) ||
				!strings.Contains(err.Error(), "journalctl -u ftclock-shim@"+id+".service")) {
				t.Error(err)
			}
			if entries, _ := os.ReadDir(h.State); len(entries) > 0 {
				t.Errorf("left: %v", entries)
			}
		})
	}
}

// The bus in here is a fake that takes the connection and says nothing.
func TestASilentBusIsGivenUp(t *testing.T) {
	t.Chdir(t.TempDir()) // a socket's address is short; the directory of a test may not be
	bus, err := net.Listen("unix", "bus")
	if err != nil {
		t.Fatal(err)
	}
	defer bus.Close()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=bus")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := connect(ctx); err == nil {
		t.Error("connected")
	}
}

// The readings may be on a disk that hangs: the shim is started without systemd then, which would hang there as well.
func TestADiskThatHangs(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	dir := hang.Dir(t)
	direct, note := false, ""
	h := Host{
		Booted: t.TempDir(), State: t.TempDir(), LastStops: filepath.Join(dir, "below"),
		Connect: func(context.Context) (Manager, error) { return &manager{t: t}, nil },
		Direct:  func(context.Context, string, spawn.Spec) error { direct = true; return nil },
		Note:    func(_, warning string) { note = warning },
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := h.Start(ctx, options); err != nil || !direct || !strings.Contains(note, "its disk hangs") {
		t.Errorf("got %v, direct %t, note %q", err, direct, note)
	}
}
