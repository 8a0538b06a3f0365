package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/control"
	metadata "ftclock/xml-templates"
)

/*
Theory of operation

A shim serves one domain, for as long as its QEMU lives. There are two kinds.

A relay stands between libvirt and QEMU from the domain's start. libvirt has bound monitor.sock and will hand QEMU the
listening socket; the hook has renamed that file and starts the relay, which binds monitor.sock itself. So libvirt
connects to the relay, and the relay to the renamed file, which is QEMU. For each connection of libvirt's there is one
to QEMU: greeting, capabilities and descriptor sets are as without a shim, and when libvirtd comes back after a
restart, it finds what it would have found. A second client waits in the socket's queue, as it would with QEMU.

The bytes are moved as they come. A recogniser looks at a copy and tells the domain of stop, cont, STOP and RESUME.
When QEMU's greeting comes, the module is loaded into QEMU, and the page that it makes is opened. Before the last byte
of a cont goes on, the domain writes the order for the pause that ends into the page. The very first cont waits, bounded,
until the module is there; if it can't be had and the domain requires it, that cont, and nothing else ever, is answered with an
error by the shim.

A watch has no monitor. It is for a domain that was started without a shim: it loads the module, gives it the standing
policy, and keeps the record.

Whatever fails later, page, recogniser or module, the relay goes on. It ends when QEMU has ended; a SIGTERM before
that ends only a shim whose QEMU never came, or a watch, which takes nothing away with it: the module stays, with its
standing policy.
*/

// Config is what a shim is started with.
type Config struct {
	Version string
	UUID    string
	Name    string
	Clock   string // the domain's clock element as XML; "" watches only
	Module  string // path of libftclock-qemu.so
	State   string // directory of all shims' states, control.Dir

	// A relay has the domain's directory with its two sockets, and the file that will hold QEMU's pid.
	DomainDir string
	PIDFile   string
	// A watch has QEMU's pid.
	PID int

	Log zerolog.Logger
	// Ready is called once, when the shim can be connected to.
	Ready func()
}

// Names in a domain's directory. The second is what the hook renames libvirt's socket to; it is no longer than the
// first, since the whole path may be as long as a socket's address can be.
const (
	MonitorSocket = "monitor.sock"
	QEMUSocket    = "monitor.qemu"
)

// lastWait bounds how long the shim stays after QEMU's end for libvirt to read what QEMU said last.
const lastWait = 30 * time.Second

type shim struct {
	Config
	domain *domain
	since  time.Time
	dir    string // own state

	relays chan struct{} // holds one token while a connection is relayed
	dirFD  int           // of DomainDir, so that nobody can put another in its place
	socket *net.UnixListener

	mu      sync.Mutex
	qemu    process
	ended   chan struct{} // closed when QEMU has
	quit    chan struct{} // closed on a request to end
	oneQuit sync.Once
}

// Run serves the domain until QEMU has ended. It returns an error only if the service couldn't begin.
func Run(c Config) error {
	var policy *metadata.Policy
	if c.Clock != "" {
		p, err := metadata.ParseElement([]byte(c.Clock))
		if err != nil {
			return err
		}
		policy = &p
	}
	s := &shim{
		Config: c,
		domain: newDomain(c.Log, policy, c.DomainDir != ""),
		since:  time.Now(),
		dir:    filepath.Join(c.State, c.UUID),
		relays: make(chan struct{}, 1),
		dirFD:  -1,
		ended:  make(chan struct{}),
		quit:   make(chan struct{}),
	}
	s.domain.load = s.load
	if c.DomainDir == "" {
		p, err := openProcess(c.PID)
		if err != nil {
			return err
		}
		s.setQEMU(p)
	}

	listener, err := s.claim()
	if err != nil {
		return err
	}
	defer s.release()
	if c.DomainDir != "" {
		if err := s.bind(); err != nil {
			return err
		}
		defer s.unbind()
		go s.serveMonitor()
	} else {
		s.domain.mu.Lock()
		s.domain.begin()
		loading := s.domain.loading
		s.domain.mu.Unlock()
		<-loading
		if s.domain.state == control.Uncorrected {
			return errors.New(s.domain.why)
		}
	}
	go s.serveControl(listener)

	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	c.Ready()
	c.Log.Info().Str("version", c.Version).Msg("ready")
	for {
		select {
		case <-s.ended:
			s.finish()
			c.Log.Info().Msg("QEMU has ended")
			return nil
		case <-s.quit:
			c.Log.Info().Msg("ending on request")
			return nil
		case sig := <-terms:
			if sig == syscall.SIGHUP {
				continue
			}
			if c.DomainDir != "" && s.qemuLives() {
				c.Log.Warn().Msg("not ending: libvirt would give up the domain; the relay ends with QEMU")
				continue
			}
			c.Log.Info().Msg("ending on a signal")
			return nil
		}
	}
}

// finish lets the connection that is being relayed come to its end.
func (s *shim) finish() {
	select {
	case s.relays <- struct{}{}:
	case <-time.After(lastWait):
		s.Log.Warn().Msg("libvirt didn't read what QEMU said last")
	}
}

func (s *shim) mode() control.Mode {
	if s.DomainDir == "" {
		return control.Watch
	}
	return control.Relay
}

func (s *shim) setQEMU(p process) {
	s.mu.Lock()
	s.qemu = p
	s.mu.Unlock()
	s.domain.mu.Lock()
	s.domain.qemu = p.pid
	s.domain.mu.Unlock()
	go func() {
		p.wait()
		close(s.ended)
	}()
}

func (s *shim) knownQEMU() process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.qemu
}

func (s *shim) qemuLives() bool {
	if s.knownQEMU().pid == 0 {
		// It may be there without having been found: as long as its socket is taken, it is.
		inodes, err := listeners(filepath.Join(s.DomainDir, MonitorSocket))
		return err == nil && len(inodes) > 0
	}
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// load is one attempt to have the module in QEMU.
func (s *shim) load() {
	ctx, cancel := contextFor()
	defer cancel()
	p := s.knownQEMU()
	if p.pid == 0 {
		var err error
		p, err = findQEMU(ctx, s.PIDFile, filepath.Join(s.DomainDir, MonitorSocket))
		if err != nil {
			s.domain.loaded(nil, "", err)
			return
		}
		s.setQEMU(p)
	}
	page, method, err := loadModule(ctx, p, s.Module)
	s.domain.loaded(page, method, err)
}

// bind takes the place of libvirt's socket. Addresses go through the open directory: that keeps them short, and
// QEMU's user, to whom the directory belongs, can't lead us elsewhere.
func (s *shim) bind() error {
	fd, err := unix.Open(s.DomainDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the domain's directory %s: %w", s.DomainDir, err)
	}
	s.dirFD = fd
	s.socket, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.address(MonitorSocket), Net: "unix"})
	if err != nil {
		return fmt.Errorf("listening on %s in %s: %w", MonitorSocket, s.DomainDir, err)
	}
	s.socket.SetUnlinkOnClose(false)
	return nil
}

func (s *shim) address(name string) string {
	return "/proc/self/fd/" + strconv.Itoa(s.dirFD) + "/" + name
}

// unbind removes what was bound. QEMU or libvirt may have removed it already, with its directory.
func (s *shim) unbind() {
	if s.socket != nil {
		_ = s.socket.Close()
		_ = unix.Unlinkat(s.dirFD, MonitorSocket, 0)
	}
	_ = unix.Close(s.dirFD)
}

// serveMonitor relays one connection after the other.
func (s *shim) serveMonitor() {
	for {
		client, err := s.socket.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.Log.Error().Err(err).Msg("accepting libvirt's connection")
			time.Sleep(100 * time.Millisecond) // out of descriptors or memory: it may pass
			continue
		}
		qemu, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.address(QEMUSocket), Net: "unix"})
		if err != nil {
			s.Log.Error().Err(err).Msg("connecting to QEMU's monitor")
			_ = client.Close()
			continue
		}
		s.Log.Info().Msg("monitor connected")
		r := &relay{client: client, qemu: qemu, observer: s.domain}
		s.domain.connected()
		s.relays <- struct{}{}
		err = r.run()
		<-s.relays
		s.Log.Info().Err(err).Msg("monitor disconnected")
	}
}

// claim makes the domain's state directory, and the socket for requests in it.
func (s *shim) claim() (*net.UnixListener, error) {
	if err := os.MkdirAll(s.State, 0o711); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	path := filepath.Join(s.dir, control.SocketName)
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("another shim serves domain %s (%s)", s.Name, s.UUID)
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return nil, fmt.Errorf("clearing a dead shim's state: %w", err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	start, err := StartTime(os.Getpid())
	if err != nil {
		return nil, err
	}
	info, err := json.Marshal(control.Info{Name: s.Name, UUID: s.UUID, Mode: s.mode(), Shim: os.Getpid(), Start: start})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.dir, control.InfoName), append(info, '\n'), 0o600); err != nil {
		return nil, fmt.Errorf("writing the shim's state: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		_ = os.RemoveAll(s.dir)
		return nil, fmt.Errorf("listening for requests: %w", err)
	}
	return listener, nil
}

func (s *shim) release() {
	_ = os.RemoveAll(s.dir)
}

// StartTime gives a process's start in clock ticks since boot (proc(5), stat, field 22).
func StartTime(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("reading a process's start time: %w", err)
	}
	// The second field is the program's name, which may hold anything, in parentheses.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("reading process %d's start time: too few fields", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// serveControl answers requests of the command line.
func (s *shim) serveControl(listener *net.UnixListener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			var request control.Request
			if err := control.Receive(conn, &request); err != nil {
				return
			}
			answer := s.answer(request)
			_ = control.Send(conn, answer)
			if request.Do == "quit" && answer.Error == "" {
				s.oneQuit.Do(func() { close(s.quit) })
			}
		}()
	}
}

func (s *shim) answer(r control.Request) control.Answer {
	switch r.Do {
	case "status":
	case "policy":
		var policy *metadata.Policy
		if r.Clock != "" {
			p, err := metadata.ParseElement([]byte(r.Clock))
			if err != nil {
				return control.Answer{Error: err.Error()}
			}
			policy = &p
		}
		s.domain.setPolicy(policy)
	case "quit":
		if s.mode() == control.Relay && s.qemuLives() {
			return control.Answer{Error: "this shim carries the domain's monitor: it ends with the domain"}
		}
		s.domain.setPolicy(nil)
	default:
		return control.Answer{Error: fmt.Sprintf("unknown request %q; known are status, policy, quit", r.Do)}
	}
	status := &control.Status{
		Name: s.Name, UUID: s.UUID, Version: s.Version, Mode: s.mode(), Shim: os.Getpid(), Since: s.since,
	}
	s.domain.status(status, min(max(r.Records, 0), 256))
	return control.Answer{Status: status}
}
