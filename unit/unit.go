package unit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/disk"
	"ftclock/host"
	"ftclock/spawn"
)

const (
	// dialWait bounds the connection to systemd: a bus that hangs must leave time for a start without it.
	dialWait = 5 * time.Second
	// beginWait bounds how long systemd may take to run the unit's program, for the same reason.
	beginWait = 8 * time.Second
	// tries bounds how often a unit is started whose program doesn't say why it ended: it may have been killed, or not have run.
	tries = 3
	// endWait bounds the end of a unit that was killed.
	endWait = 5 * time.Second
	// askWait bounds one question to systemd.
	askWait = time.Second
	// againWait is the time between two looks at a unit that is still there from the domain's last run.
	againWait = 50 * time.Millisecond
)

// Name is the unit that serves a shim's UUID.
func Name(id string) string { return "ftclock-shim@" + id + ".service" }

// Host is how shims are started on this host.
type Host struct {
	Booted    string // a directory that is there where systemd runs the host: sd_booted(3)
	State     string // the shims' states
	LastStops string // the shims' readings for restored guests
	Root      string // this process's root directory
	InitRoot  string // that of process 1
	Bus       string // the socket of the system bus

	Connect func(context.Context) (Manager, error)
	Direct  func(ctx context.Context, state string, o spawn.Spec) error // without systemd
	Note    func(domain, warning string)
	Shim    func() (string, error) // the path of the shim's program
}

// Manager is what is needed of systemd: org.freedesktop.systemd1(5).
type Manager interface {
	StartUnitContext(ctx context.Context, name, mode string, result chan<- string) (int, error)
	KillUnitContext(ctx context.Context, name string, signal int32)
	GetUnitPropertyContext(ctx context.Context, name, property string) (*systemd.Property, error)
	GetServicePropertyContext(ctx context.Context, name, property string) (*systemd.Property, error)
	Close()
}

// System is this host.
var System = Host{
	Booted:    host.SystemdRuns,
	State:     control.Dir,
	LastStops: host.DataDir,
	Root:      "/",
	InitRoot:  "/proc/1/root",
	Bus:       "/run/dbus/system_bus_socket",
	Connect:   connect,
	Direct:    spawn.Start,
	Note:      spawn.Note,
	Shim:      spawn.ShimPath,
}

// connect connects to systemd by the system bus, or without one directly. The connection outlives ctx.
func connect(ctx context.Context) (Manager, error) {
	type answer struct {
		conn *systemd.Conn
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		conn, err := systemd.NewWithContext(context.Background())
		answers <- answer{conn, err}
	}()
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, a.err
		}
		return a.conn, nil
	case <-ctx.Done():
		return nil, errors.New("no answer")
	}
}

// notStarted is an error after which the unit has no shim, and never will: it may be started directly.
type notStarted struct {
	error
	unknown bool // systemd doesn't know the unit
	again   bool // it is about to start it once more
}

// Start starts the shim and returns when it is ready, as spawn.Start does: in its unit where systemd runs the host and
// knows the unit, else directly. Where systemd can't be asked, or can't set the unit up, the shim is started directly, with
// a note in the domain's log. In a container that has the host's processes before it, it is a unit of the host's systemd or an
// error; in one that has its own, the host's systemd isn't asked. An error names the unit if it was its.
func Start(ctx context.Context, o spawn.Spec) error { return System.Start(ctx, o) }

// Start is the function of that name, on host h.
func (h Host) Start(ctx context.Context, o spawn.Spec) error {
	if h.contained() {
		return h.startOutside(ctx, o)
	}
	if !isDir(h.Booted) || numberless(h.Bus) {
		return h.Direct(ctx, h.State, o)
	}
	err := h.byUnit(ctx, o)
	var not notStarted
	if !errors.As(err, &not) {
		return err
	}
	if !not.unknown {
		h.Note(o.Name, fmt.Sprintf("starting the shim without %s: %v", Name(o.UUID), not))
	}
	return h.Direct(ctx, h.State, o)
}

func (h Host) byUnit(ctx context.Context, o spawn.Spec) error {
	dialing, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	m, err := h.Connect(dialing)
	if err != nil {
		return notStarted{error: fmt.Errorf("connecting to systemd: %w", err)}
	}
	defer m.Close()
	// The unit sees the system read-only, but for directories that have to be there.
	err = disk.InTime(ctx, h.LastStops, func() error {
		return errors.Join(os.MkdirAll(h.State, 0o711), os.MkdirAll(h.LastStops, 0o700))
	})
	if err != nil {
		return notStarted{error: fmt.Errorf("making the shims' directories: %w", err)}
	}
	if err := spawn.Leave(h.State, o); err != nil {
		return err
	}
	if err = h.start(ctx, m, o.UUID); err == nil {
		return nil
	}
	// Who takes the order away has it: if it isn't there any more, the shim got ready after all.
	if !spawn.Take(h.State, o.UUID) {
		return nil
	}
	name := Name(o.UUID)
	var not notStarted
	direct := errors.As(err, &not)
	if !direct || not.again {
		h.end(m, name)
	}
	if direct {
		return not
	}
	return fmt.Errorf("%w (in %s; see journalctl -u %s)", err, name, name)
}

// start starts the unit, and waits until its shim has taken the order.
func (h Host) start(ctx context.Context, m Manager, id string) error {
	begin, cancel := context.WithTimeout(ctx, beginWait)
	defer cancel()
	for failed := 0; ; {
		results := make(chan string, 1)
		if _, err := m.StartUnitContext(begin, Name(id), "replace", results); err != nil {
			var reply dbus.Error
			unknown := errors.As(err, &reply) && reply.Name == "org.freedesktop.systemd1.NoSuchUnit"
			return notStarted{error: err, unknown: unknown, again: !unknown}
		}
		result, err := h.result(ctx, begin, m, results, id)
		switch {
		case err != nil:
			return err
		case !spawn.Waiting(h.State, id):
			return nil
		case result != "done":
			if reason := spawn.Refusal(h.State, id); reason != "" {
				return errors.New(reason)
			}
			err = fmt.Errorf("systemd couldn't start the shim: %s", result)
			if failed++; failed == tries {
				return notStarted{error: err, again: true}
			}
		default: // The unit was up already: the domain's last shim hasn't quite ended.
			err = notStarted{error: errors.New("it still serves an earlier start of the domain")}
		}
		select {
		case <-time.After(againWait):
		case <-begin.Done():
			return err
		}
	}
}

// result waits for the result of a start job, if systemd has begun with it in time.
func (h Host) result(ctx, begin context.Context, m Manager, results <-chan string, id string) (string, error) {
	select {
	case result := <-results:
		return result, nil
	case <-begin.Done():
	}
	// A bus that died meanwhile has taken the result with it.
	asking, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	if pid, err := m.GetServicePropertyContext(asking, Name(id), "MainPID"); err != nil || pid.Value.Value() == uint32(0) {
		return "", notStarted{error: errors.New("systemd doesn't come to it")}
	}
	for {
		select {
		case result := <-results:
			return result, nil
		case <-time.After(againWait):
			if !spawn.Waiting(h.State, id) {
				return "done", nil
			}
		case <-ctx.Done():
			return "", errors.New("the shim wasn't ready in time")
		}
	}
}

// end ends what runs in the unit, and waits for that. The order has been taken away, so what systemd starts once more ends by itself.
func (h Host) end(m Manager, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), endWait)
	defer cancel()
	for ctx.Err() == nil {
		m.KillUnitContext(ctx, name, int32(unix.SIGKILL))
		state, err := m.GetUnitPropertyContext(ctx, name, "ActiveState")
		if err != nil || state.Value.Value() == "failed" || state.Value.Value() == "inactive" {
			return
		}
		time.Sleep(againWait)
	}
}
