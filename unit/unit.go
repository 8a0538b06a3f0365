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
	"ftclock/spawn"
)

const (
	// dialWait bounds the connection to systemd: a bus that hangs must leave time for a start without it.
	dialWait = 5 * time.Second
	// takeWait bounds how long systemd may take to run the unit's program, for the same reason.
	takeWait = 8 * time.Second
	// margin is what the unit's own bound on a start is below the caller's, so that its answer is heard.
	margin = 2 * time.Second
	// endWait bounds the end of a unit that was killed.
	endWait = 5 * time.Second
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

	Connect func(context.Context) (Manager, error)
	Direct  func(context.Context, spawn.Options) error // without systemd
	Note    func(domain, warning string)
}

// Manager is what is needed of systemd: org.freedesktop.systemd1(5).
type Manager interface {
	StartUnitContext(ctx context.Context, name, mode string, result chan<- string) (int, error)
	KillUnitContext(ctx context.Context, name string, signal int32)
	GetUnitPropertyContext(ctx context.Context, name, property string) (*systemd.Property, error)
	Close()
}

// System is this host.
var System = Host{
	Booted:    "/run/systemd/system",
	State:     control.Dir,
	LastStops: control.LastStops,
	Connect:   connect,
	Direct:    spawn.Start,
	Note:      spawn.Note,
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

// notStarted is an error after which the unit hasn't begun to start a shim, and never will: it may be started directly.
type notStarted struct {
	error
	unknown bool // systemd doesn't know the unit
}

// Start starts the shim and returns when it is ready, as spawn.Start does: in its unit where systemd runs the host and
// knows the unit, else directly. Where systemd can't be asked, or can't set the unit up, the shim is started directly, with
// a note in the domain's log. An error names the unit if it was its.
func Start(ctx context.Context, o spawn.Options) error { return System.Start(ctx, o) }

// Start is the function of that name, on host h.
func (h Host) Start(ctx context.Context, o spawn.Options) error {
	if info, err := os.Stat(h.Booted); err != nil || !info.IsDir() {
		return h.Direct(ctx, o)
	}
	err := h.byUnit(ctx, o)
	var not notStarted
	if !errors.As(err, &not) {
		return err
	}
	if !not.unknown {
		h.Note(o.Name, fmt.Sprintf("starting the shim without %s: %v", Name(o.UUID), not))
	}
	return h.Direct(ctx, o)
}

func (h Host) byUnit(ctx context.Context, o spawn.Options) error {
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
	order := spawn.Order{Options: o, Wait: time.Minute}
	if end, ok := ctx.Deadline(); ok {
		order.Wait = min(order.Wait, max(time.Until(end)-margin, time.Second))
	}
	if err := spawn.Leave(h.State, order); err != nil {
		return err
	}
	if err = h.start(ctx, m, o.UUID); err == nil {
		return nil
	}
	// Who takes the order away has it: if it is still there, no shim was started, and none will be.
	if spawn.Withdraw(h.State, o.UUID) {
		var reply dbus.Error
		unknown := errors.As(err, &reply) && reply.Name == "org.freedesktop.systemd1.NoSuchUnit"
		return notStarted{err, unknown}
	}
	name := Name(o.UUID)
	if reason := spawn.Refusal(h.State, o.UUID); reason != "" {
		err = errors.New(reason)
	} else {
		h.kill(m, name)
	}
	return fmt.Errorf("%w (in %s; see journalctl -u %s)", err, name, name)
}

// start starts the unit, and waits for the start's result.
func (h Host) start(ctx context.Context, m Manager, id string) error {
	taking, cancel := context.WithTimeout(ctx, takeWait)
	defer cancel()
	for {
		results := make(chan string, 1)
		if _, err := m.StartUnitContext(taking, Name(id), "replace", results); err != nil {
			return err
		}
		result, err := h.result(taking, results, id)
		if err != nil && !spawn.Waiting(h.State, id) {
			result, err = h.result(ctx, results, id)
		}
		if err != nil {
			return err
		}
		if result != "done" {
			return fmt.Errorf("systemd couldn't start the shim: %s", result)
		}
		if !spawn.Waiting(h.State, id) {
			return nil
		}
		// The unit was up already: the domain's last shim hasn't quite ended.
		select {
		case <-time.After(againWait):
		case <-taking.Done():
			return errors.New("it still serves an earlier start of the domain")
		}
	}
}

// result waits for the result of a start job.
func (h Host) result(ctx context.Context, results <-chan string, id string) (string, error) {
	select {
	case result := <-results:
		return result, nil
	case <-ctx.Done():
	}
	if spawn.Waiting(h.State, id) {
		return "", errors.New("systemd doesn't come to it")
	}
	// A bus that died meanwhile has taken the result with it; a shim that answers is ready.
	if _, err := control.Ask(h.State, id, control.Request{Do: "status"}); err == nil {
		return "done", nil
	}
	return "", errors.New("the shim wasn't ready in time")
}

// kill ends what runs in the unit, and waits for that.
func (h Host) kill(m Manager, name string) {
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
