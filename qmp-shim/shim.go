package shim

import (
	"errors"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/keeper"
	"ftclock/record"
	"ftclock/relay"
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

A recogniser looks at the bytes on their way and tells the domain of stop, cont, STOP and RESUME. When QEMU's greeting
comes, the module is loaded into QEMU, and the page that it makes is opened. Before the last byte of a cont goes on,
the domain writes the order for the pause that ends into the page. The very first cont waits, bounded, until the module
is there; if it can't be had and the domain requires it, that cont, and nothing else ever, is answered with an error by the shim.

A watch has no monitor. It is for a domain that was started without a shim, or whose metadata wants the monitor left alone: it
loads the module, gives it the standing policy, and keeps the record. The latter's is started by the hook, too, when QEMU runs: a
state that it loads is caught up as a relay's is.

A shim may be killed at any moment, and is started again: package keeper says by whom. Whatever a worker, which is one life of the
shim, opens for long it puts into the store, and whatever it finds there when it begins, it goes on with: Run makes no difference
between a first worker and a later one but for what is there.

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
	Policy  string // the file of the host's policy that has it; "" is the domain's metadata
	Module  string // path of libftclock-qemu.so
	Sealed  bool   // QEMU may see other files than this process: it is given the module in a memory file
	State   string // directory of all shims' states, control.Dir
	// LastStops is the directory of readings for restored guests; host.DataDir. The records are there, too.
	LastStops string

	// Incoming says that QEMU was started to load a state, and which way it came: control.Migrated, control.Restored or "". Anchor is what
	// the domain's metadata has; in a guest that begins anew it is an earlier one's, and not looked at.
	Incoming string
	Anchor   *metadata.Anchor

	// A relay has the domain's directory with its two sockets, and the file that will hold QEMU's pid.
	DomainDir string
	PIDFile   string
	// A watch has QEMU's pid.
	PID int

	Log zerolog.Logger
	// Store keeps descriptors beyond this process's life.
	Store *keeper.Store
	// Begin is called once in a shim's life, when it can be connected to. An error ends it.
	Begin func() error
}

// Names of descriptors in the store.
const (
	fdState   = "state"   // stateFile
	fdControl = "control" // listening for requests
	fdDir     = "dir"     // the domain's directory
	fdMonitor = "monitor" // listening for libvirt
	fdClient  = "client"  // libvirt's connection
	fdQEMU    = "qemu"    // ours to QEMU for it
	fdProcess = "process" // QEMU's pidfd
	fdPage    = "page"    // the module's page
)

// fdPipes are the names of the pipes' ends, a pair a direction.
var fdPipes = [2][2]string{relay.Up: {"up-out", "up-in"}, relay.Down: {"down-out", "down-in"}}

// lastWait bounds how long the shim stays after QEMU's end for libvirt to read what QEMU said last.
const lastWait = 30 * time.Second

// endWait bounds what is written at the end, and how long a domain's next shim waits for the end of the last one.
const endWait = 10 * time.Second

// maxRequests bounds the requests that are answered at the same time.
const maxRequests = 16

type shim struct {
	Config
	domain *domain
	state  *stateFile
	dir    string // own state

	relays   chan struct{}     // holds one token while a connection is relayed
	socket   *net.UnixListener // libvirt's, once it is bound
	requests *net.UnixListener

	mu      sync.Mutex
	qemu    process
	ended   chan struct{} // closed when QEMU has
	quit    chan struct{} // closed on a request to end
	oneQuit sync.Once

	published atomic.Int64 // CLOCK_REALTIME, ns, of the last "published"; 0: none
	live      liveMetadata
}

// Run serves the domain until QEMU has ended, or goes on serving it in the place of a worker that died. It returns an
// error only if the service couldn't begin. With began an earlier worker's did, and what that left is left to the next one.
func Run(c Config) (began bool, err error) {
	s := &shim{
		Config: c,
		dir:    filepath.Join(c.State, c.UUID),
		relays: make(chan struct{}, 1),
		ended:  make(chan struct{}),
		quit:   make(chan struct{}),
	}
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	if err := s.remember(); err != nil {
		return Begun(c.Store), err
	}
	m := s.domain.notes.read()
	began = m.Began
	// A later worker that fails leaves all that to the next one.
	defer func() {
		if err == nil || !began {
			s.release()
		}
	}()
	if err := s.begin(m); err != nil {
		return began, err
	}
	c.Store.Ready()
	c.Log.Info().Str("version", c.Version).Uint64("worker", m.Workers).Msg("ready")
	s.serve(terms)
	return true, nil
}

// begin begins the service, or goes on with it where the last worker stopped.
func (s *shim) begin(m memory) (err error) {
	d := s.domain
	d.load, d.importState = s.load, s.importState
	d.look = func() { s.lookAtMetadata(true) }
	d.recorder = newRecorder(d, s.mode() == control.Watch, record.Config{
		Dir: s.LastStops, UUID: s.UUID, Name: s.Name, Shim: s.Version, Worker: m.Workers,
	})
	go d.recorder.run()
	if err := s.findProcess(); err != nil {
		return err
	}
	if s.requests, err = s.claim(); err != nil {
		return err
	}
	if s.mode() == control.Relay {
		if err := s.bind(); err != nil {
			return err
		}
	}
	if err := s.resume(m.Began); err != nil {
		return err
	}
	go s.serveControl(s.requests)
	if m.Began {
		return nil
	}
	p := d.view().policy
	if direct := p != nil && p.Monitor == metadata.Direct; (s.mode() == control.Relay || direct) && s.Clock != "" {
		go func() { _ = record.SetManaged(s.LastStops, s.UUID, true) }() // its disk may hang
	}
	if err := s.Begin(); err != nil {
		return err
	}
	d.notes.change(func(m *memory) { m.Began = true })
	return nil
}

// resume goes on with the page and the connection that the last worker had, if there was one, or has the module loaded.
func (s *shim) resume(began bool) error {
	var page *clockpage.Page
	var err error
	if fd, ok := s.Store.Get(fdPage); ok {
		page, err = mapPage(fd)
	}
	if err != nil {
		s.Log.Warn().Err(err).Msg("the page that the last worker had open can't be used: the module follows its last policy, and nothing is recorded; restart the domain when you can")
	}
	_, connected := s.Store.Get(fdQEMU)
	s.domain.resume(page, connected)
	if page != nil && page.Counts().Pauses == 0 {
		s.importState() // the last worker may not have got to it
	}
	s.domain.recorder.wake()
	if s.mode() == control.Relay {
		old := s.oldRelay()
		if old != nil {
			s.relays <- struct{}{} // before QEMU's end can be seen: its last words go on first
		}
		go s.serveMonitor(old)
	} else if page == nil { // a watch isn't ready before
		if err := s.domain.module.loadNow(); err != nil && !began {
			return err
		}
	}
	return nil
}

// serve waits for the end.
func (s *shim) serve(terms <-chan os.Signal) {
	end := func(why record.End, what string) {
		s.bounded("writing the record", func() { s.domain.recorder.end(why) })
		s.Log.Info().Msg(what)
	}
	for {
		select {
		case <-s.ended:
			s.removeQEMUSocket()
			s.finish()
			s.bounded("writing down the guest's last reading and its record", func() {
				s.keepLastStop()
				s.domain.recorder.end(record.EndQEMU)
			})
			s.Log.Info().Msg("QEMU has ended")
			return
		case <-s.quit:
			end(record.EndRequest, "ending on request")
			return
		case which := <-terms:
			switch {
			case which == syscall.SIGHUP:
				s.upgrade()
			case s.mode() == control.Relay && s.qemuLives():
				s.Log.Warn().Msg("not ending: libvirt would give up the domain; shut the domain down, and the relay ends with it")
			default:
				end(record.EndSignal, "ending on a signal")
				return
			}
		}
	}
}

// release takes away what begin put there.
func (s *shim) release() {
	if s.socket != nil {
		s.unbind()
	}
	if s.requests != nil {
		_ = os.RemoveAll(s.dir)
	}
}

// upgrade goes on as the program that is installed now. Under a keeper that is the keeper's to do.
func (s *shim) upgrade() {
	if s.Store.KeeperPID() > 0 {
		return
	}
	s.Log.Error().Err(s.Store.Upgrade()).Msg("not upgrading")
}

// Begun says whether there was an earlier worker.
func Begun(store *keeper.Store) bool {
	_, begun := store.Get(fdState)
	return begun
}

// begins is what the first worker of a domain knows.
func (s *shim) begins() memory {
	m := memory{Since: time.Now(), Clock: s.Clock, Metadata: s.Clock, Gate: s.mode() == control.Relay}
	if s.Policy != "" {
		m.Metadata = "" // there is none: the host's policy stays until there is some
	}
	return m
}

// remember opens the state that the last worker left, or makes a new one.
func (s *shim) remember() error {
	fd, old := s.Store.Get(fdState)
	if !old {
		var err error
		if fd, err = newState(); err != nil {
			return err
		}
		s.Store.Put(fdState, fd)
	}
	var err error
	if s.state, err = openState(fd); err != nil {
		return err
	}
	fresh := s.begins()
	m := fresh
	if old {
		if m, err = s.state.load(); err != nil {
			s.Log.Error().Err(err).Msg("beginning anew: the status begins with this worker; nothing has to be done")
			m = fresh
			// A domain that runs must never be refused a cont, nor left.
			m.Gate, m.Began = false, !errors.Is(err, errEmpty)
		}
	}
	m.Workers++
	save := func(m memory) {
		if err := s.state.save(m); err != nil {
			s.Log.Error().Err(err).Msg("the next worker will know less; nothing has to be done")
		}
	}
	s.domain, err = newDomain(s.Log, m, save)
	if err != nil && old { // by a worker of another version: the page keeps its standing policy
		s.Log.Error().Err(err).Msg("the policy that the last worker left can't be read; only watching: `ftclock enable --live` gives it one")
		m.Clock = ""
		s.domain, err = newDomain(s.Log, m, save)
	}
	return err
}

// findProcess opens QEMU's process, where it is known already.
func (s *shim) findProcess() error {
	if fd, ok := s.Store.Get(fdProcess); ok {
		s.setQEMU(process{pid: s.domain.notes.read().QEMU, fd: fd})
		return nil
	}
	if s.mode() == control.Watch {
		fd, err := host.OpenProcess(s.PID)
		if err != nil {
			return err
		}
		s.keepQEMU(process{pid: s.PID, fd: fd})
	}
	return nil
}

// keepQEMU notes which process QEMU is, for this worker and the next ones.
func (s *shim) keepQEMU(p process) {
	s.domain.notes.change(func(m *memory) { m.QEMU = p.pid })
	s.Store.Put(fdProcess, p.fd)
	s.setQEMU(p)
}

// bounded has f done, and doesn't wait for ever: a disk may hang.
func (s *shim) bounded(what string, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(endWait):
		s.Log.Warn().Msg(what + " takes too long: ending without; look after the disk of " + s.LastStops)
	}
}

// finish lets the connection that is being relayed come to its end.
func (s *shim) finish() {
	select {
	case s.relays <- struct{}{}:
	case <-time.After(lastWait):
		s.Log.Warn().Msg("libvirt didn't read what QEMU said last; if virsh hangs, restart libvirt's daemon")
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
		return attach.Listens(filepath.Join(s.DomainDir, control.MonitorSocket))
	}
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}
