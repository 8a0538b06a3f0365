package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/disk"
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
	Module  string // path of libftclock-qemu.so
	State   string // directory of all shims' states, control.Dir
	// LastStops is the directory of readings for restored guests; control.LastStops. The records are there, too.
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

	relays chan struct{} // holds one token while a connection is relayed
	socket *net.UnixListener

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
	began = s.domain.memory.Began
	s.domain.load = s.load
	s.domain.look = s.lookBeside
	s.domain.importState = s.importState
	s.domain.recorder = newRecorder(s.domain, s.mode() == control.Watch, record.Config{
		Dir: c.LastStops, UUID: c.UUID, Name: c.Name, Shim: c.Version, Worker: s.domain.memory.Workers,
	})
	go s.domain.recorder.run()
	if err := s.findProcess(); err != nil {
		return began, err
	}
	requests, err := s.claim()
	if err != nil {
		return began, err
	}
	// A later worker that fails leaves all that to the next one.
	defer func() {
		if err == nil || !began {
			s.release()
		}
	}()
	if c.DomainDir != "" {
		if err := s.bind(); err != nil {
			return began, err
		}
		defer func() {
			if err == nil || !began {
				s.unbind()
			}
		}()
	}
	page, err := s.oldPage()
	if err != nil {
		s.domain.log.Warn().Err(err).Msg("the page that the last worker had open can't be used: the module follows its last policy, and nothing is recorded; restart the domain when you can")
	}
	_, connected := c.Store.Get(fdQEMU)
	s.domain.resume(page, connected)
	if page != nil && page.Counts().Pauses == 0 {
		s.importState(page) // the last worker may not have got to it
	}
	s.domain.recorder.wake()
	if c.DomainDir != "" {
		old := s.oldRelay()
		if old != nil {
			s.relays <- struct{}{} // before QEMU's end can be seen: its last words go on first
		}
		go s.serveMonitor(old)
	} else if err := s.watch(page != nil); err != nil && !began {
		return began, err
	}
	go s.serveControl(requests)
	if (c.DomainDir != "" || s.domain.direct()) && c.Clock != "" && !began {
		go func() { _ = record.SetManaged(c.LastStops, c.UUID, true) }() // its disk may hang
	}

	if !began {
		if err := c.Begin(); err != nil {
			return false, err
		}
		s.domain.mu.Lock()
		s.domain.memory.Began = true
		s.domain.remember()
		s.domain.mu.Unlock()
	}
	c.Store.Ready()
	c.Log.Info().Str("version", c.Version).Uint64("worker", s.domain.memory.Workers).Msg("ready")
	for {
		select {
		case <-s.ended:
			s.removeQEMUSocket()
			s.finish()
			s.bounded("writing down the guest's last reading and its record", func() {
				s.keepLastStop()
				s.domain.recorder.end(record.EndQEMU)
			})
			c.Log.Info().Msg("QEMU has ended")
			return true, nil
		case <-s.quit:
			s.bounded("writing the record", func() { s.domain.recorder.end(record.EndRequest) })
			c.Log.Info().Msg("ending on request")
			return true, nil
		case which := <-terms:
			if which == syscall.SIGHUP {
				s.upgrade()
				continue
			}
		}
		if s.mode() == control.Relay && s.qemuLives() {
			c.Log.Warn().Msg("not ending: libvirt would give up the domain; shut the domain down, and the relay ends with it")
			continue
		}
		s.bounded("writing the record", func() { s.domain.recorder.end(record.EndSignal) })
		c.Log.Info().Msg("ending on a signal")
		return true, nil
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
	fresh := memory{Since: time.Now(), Clock: s.Clock, Metadata: s.Clock, Gate: s.mode() == control.Relay}
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
	if err != nil {
		return err
	}
	save(m)
	return nil
}

// findProcess opens QEMU's process, where it is known already.
func (s *shim) findProcess() error {
	if fd, ok := s.Store.Get(fdProcess); ok {
		s.setQEMU(process{pid: s.domain.memory.QEMU, fd: fd})
		return nil
	}
	if s.mode() == control.Watch {
		p, err := openProcess(s.PID)
		if err != nil {
			return err
		}
		s.keepQEMU(p)
	}
	return nil
}

// keepQEMU notes which process QEMU is, for this worker and the next ones.
func (s *shim) keepQEMU(p process) {
	s.domain.mu.Lock()
	s.domain.qemu = p.pid
	s.domain.remember()
	s.domain.mu.Unlock()
	s.Store.Put(fdProcess, p.fd)
	s.setQEMU(p)
}

// oldPage maps the page that an earlier worker opened; nil if none did.
func (s *shim) oldPage() (*clockpage.Page, error) {
	fd, ok := s.Store.Get(fdPage)
	if !ok {
		return nil, nil
	}
	f, err := reopen(fd)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return clockpage.Map(f)
}

// watch begins a watch: the module has to be there before it is ready.
func (s *shim) watch(there bool) error {
	if there {
		return nil
	}
	s.domain.mu.Lock()
	s.domain.begin()
	loading := s.domain.loading
	s.domain.mu.Unlock()
	<-loading
	s.domain.mu.Lock()
	defer s.domain.mu.Unlock()
	if s.domain.page == nil {
		return errors.New(s.domain.why)
	}
	return nil
}

// reopen duplicates a descriptor of the store's.
func reopen(fd int) (*os.File, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(own), "kept"), nil
}

// keep puts a duplicate of a socket's descriptor into the store.
func (s *shim) keep(name string, socket syscall.Conn) error {
	own, err := relay.Duplicate(socket)
	if err != nil {
		return err
	}
	s.Store.Put(name, own)
	return nil
}

// kept gives a duplicate of a descriptor of the store's; nil if there is none of that name.
func (s *shim) kept(name string) *os.File {
	fd, ok := s.Store.Get(name)
	if !ok {
		return nil
	}
	f, err := reopen(fd)
	if err != nil {
		return nil
	}
	return f
}

// keptListener and keptConn make a socket of the store's usable; nil if there is none of that name.
func (s *shim) keptListener(name string) *net.UnixListener {
	f := s.kept(name)
	if f == nil {
		return nil
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil
	}
	listener, _ := l.(*net.UnixListener)
	return listener
}

func (s *shim) keptConn(name string) *net.UnixConn {
	f := s.kept(name)
	if f == nil {
		return nil
	}
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	conn, _ := c.(*net.UnixConn)
	return conn
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
		inodes, err := listeners(filepath.Join(s.DomainDir, control.MonitorSocket))
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
	ctx, cancel := context.WithTimeout(context.Background(), loadWait)
	defer cancel()
	p := s.knownQEMU()
	if p.pid == 0 {
		var err error
		p, err = findQEMU(ctx, s.PIDFile, filepath.Join(s.DomainDir, control.MonitorSocket))
		if err != nil {
			s.domain.loaded(nil, "", err)
			return
		}
		s.keepQEMU(p)
	}
	page, fd, method, err := loadModule(ctx, p, s.Module)
	// A main thread that is never idle doesn't answer a cont either: it still pins memory, or loads a state.
	for end := time.Now().Add(busyWait); s.mode() == control.Relay && errors.Is(err, attach.ErrBusy) && time.Now().Before(end) && s.qemuLives(); {
		s.domain.busy(err)
		time.Sleep(200 * time.Millisecond) // of a process that is stopped it is known at once
		again, cancel := context.WithTimeout(context.Background(), loadWait)
		page, fd, method, err = loadModule(again, p, s.Module)
		cancel()
	}
	if err == nil {
		s.Store.Put(fdPage, fd)
	}
	s.domain.loaded(page, method, err)
	if err == nil { // the first cont waits for this, too
		s.importState(page)
	}
	debug.FreeOSMemory() // reading QEMU's symbols took more than everything else together
}

// bind takes the place of libvirt's socket. Addresses go through the open directory: that keeps them short, and
// QEMU's user, to whom the directory belongs, can't lead us elsewhere.
func (s *shim) bind() error {
	if s.socket = s.keptListener(fdMonitor); s.socket != nil {
		return nil
	}
	var err error
	if dir, begun := s.Store.Get(fdDir); !begun {
		fd, err := unix.Open(s.DomainDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening the domain's directory %s: %w", s.DomainDir, err)
		}
		s.Store.Put(fdDir, fd)
	} else if unix.Faccessat(dir, control.QEMUSocket, unix.F_OK, 0) == nil {
		_ = unix.Unlinkat(dir, control.MonitorSocket, 0) // of a worker that died between binding and keeping it
	}
	s.socket, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.address(control.MonitorSocket), Net: "unix"})
	if err != nil {
		return fmt.Errorf("listening on %s in %s: %w", control.MonitorSocket, s.DomainDir, err)
	}
	s.socket.SetUnlinkOnClose(false)
	s.domain.mu.Lock()
	s.domain.memory.Monitor = s.monitorInode()
	s.domain.remember()
	s.domain.mu.Unlock()
	return s.keep(fdMonitor, s.socket)
}

// monitorInode tells the file that is monitor.sock now from any other; 0 if there is none.
func (s *shim) monitorInode() uint64 {
	fd, ok := s.Store.Get(fdDir)
	var st unix.Stat_t
	if !ok || unix.Fstatat(fd, control.MonitorSocket, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return 0
	}
	return st.Ino
}

func (s *shim) address(name string) string {
	fd, _ := s.Store.Get(fdDir)
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
}

// unbind removes what was bound. QEMU or libvirt may have removed it already, with its directory; and a hook that gave
// a start up may have put libvirt's own socket back.
func (s *shim) unbind() {
	_ = s.socket.Close()
	if fd, ok := s.Store.Get(fdDir); ok && s.monitorInode() == s.domain.memory.Monitor {
		_ = unix.Unlinkat(fd, control.MonitorSocket, 0)
	}
	s.Store.Drop(fdMonitor)
}

// removeQEMUSocket removes what QEMU listened on. libvirt does it with the whole directory, unless its daemon ended before QEMU.
func (s *shim) removeQEMUSocket() {
	if fd, ok := s.Store.Get(fdDir); ok {
		_ = unix.Unlinkat(fd, control.QEMUSocket, 0)
	}
}

// serveMonitor relays one connection after the other, the first of which may be an earlier worker's, r.
func (s *shim) serveMonitor(r *relay.Relay) {
	for {
		if r == nil {
			client, err := s.socket.AcceptUnix()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				s.Log.Error().Err(err).Msg("accepting libvirt's connection, trying again; if it lasts, raise the host's limits on open files and memory")
				time.Sleep(100 * time.Millisecond) // out of descriptors or memory: it may pass
				continue
			}
			if r, err = s.newRelayPatiently(client); err != nil {
				s.Log.Error().Err(err).Msg("connecting to QEMU's monitor; if the domain runs, restart libvirt's daemon, which connects again")
				relay.HangUp(client)
				_ = client.Close()
				s.dropRelay()
				continue
			}
			s.domain.connected()
			s.relays <- struct{}{}
		}
		s.Log.Info().Msg("monitor connected")
		err := r.Run()
		s.dropRelay()
		<-s.relays
		r = nil
		s.Log.Info().Err(err).Msg("monitor disconnected")
	}
}

// newRelayPatiently is newRelay, patiently.
func (s *shim) newRelayPatiently(client *net.UnixConn) (r *relay.Relay, err error) {
	err = relay.Patiently(func() error {
		r, err = s.newRelay(client)
		return err
	})
	return r, err
}

// newRelay connects to QEMU for a new client. Everything is in the store when it returns.
func (s *shim) newRelay(client *net.UnixConn) (*relay.Relay, error) {
	if err := s.keep(fdClient, client); err != nil {
		return nil, err
	}
	for direction, names := range fdPipes {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return nil, os.NewSyscallError("pipe2", err)
		}
		for i, fd := range ends {
			s.Store.Put(names[i], fd)
		}
		atomic.StoreUint32(s.state.mid(direction), 0)
		atomic.StoreUint32(s.state.carry(direction), 0)
	}
	qemu, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.address(control.QEMUSocket), Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := s.keep(fdQEMU, qemu); err != nil {
		_ = qemu.Close()
		return nil, err
	}
	return s.relay(client, qemu), nil
}

// oldRelay goes on with an earlier worker's connection; nil if there is none.
func (s *shim) oldRelay() *relay.Relay {
	client, qemu := s.keptConn(fdClient), s.keptConn(fdQEMU)
	switch {
	case client == nil:
		if qemu != nil { // it died while it dropped a connection that had ended
			_ = qemu.Close()
		}
		s.dropRelay()
		return nil
	case qemu == nil: // it died between the two
		r, err := s.newRelayPatiently(client)
		if err != nil {
			s.Log.Error().Err(err).Msg("connecting to QEMU's monitor; if the domain runs, restart libvirt's daemon, which connects again")
			relay.HangUp(client)
			_ = client.Close()
			s.dropRelay()
		}
		return r
	}
	return s.relay(client, qemu)
}

func (s *shim) relay(client, qemu *net.UnixConn) *relay.Relay {
	var directions [2]relay.Direction
	for i, names := range fdPipes {
		d := &directions[i]
		d.R, _ = s.Store.Get(names[0])
		d.W, _ = s.Store.Get(names[1])
		d.Mid, d.Carry = s.state.mid(i), s.state.carry(i)
	}
	return relay.New(client, qemu, directions, s.domain)
}

func (s *shim) dropRelay() {
	for _, name := range slices.Concat([]string{fdClient, fdQEMU}, fdPipes[relay.Up][:], fdPipes[relay.Down][:]) {
		s.Store.Drop(name)
	}
}

// claim makes the domain's state directory, and the socket for requests in it.
func (s *shim) claim() (*net.UnixListener, error) {
	listener := s.keptListener(fdControl)
	old := listener != nil
	if _, err := os.Lstat(filepath.Join(s.dir, control.SocketName)); err != nil && old { // nobody can reach it any more
		if again, err := s.listen(); err != nil {
			s.Log.Warn().Err(err).Msg("this shim can't be asked any more, it serves all the same; see who removed its directory")
		} else if err := s.keep(fdControl, again); err != nil {
			_ = again.Close()
		} else {
			_ = listener.Close()
			listener = again
		}
	}
	if !old {
		var err error
		if listener, err = s.listen(); err != nil {
			return nil, err
		}
		if err := s.keep(fdControl, listener); err != nil {
			return nil, err
		}
	}
	info, err := json.Marshal(control.Info{Name: s.Name, UUID: s.UUID, Mode: s.mode()})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.dir, control.InfoName), append(info, '\n'), 0o600); err != nil {
		if !old {
			return nil, fmt.Errorf("writing the shim's state: %w", err)
		}
		s.Log.Warn().Err(err).Msg("writing the shim's state; make room in /run") // no reason to give up a monitor that is carried
	}
	return listener, nil
}

func (s *shim) listen() (*net.UnixListener, error) {
	if err := os.MkdirAll(s.State, 0o711); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	// Made now, not when there is something to write: ftclock may have been purged under this shim by then.
	err := disk.InTime(context.Background(), s.LastStops, func() error { return os.MkdirAll(s.LastStops, 0o700) })
	if err != nil {
		s.Log.Warn().Err(err).Msg("no record is kept, and no reading for a restored guest: fix the directory, and start the domain anew")
	}
	path := filepath.Join(s.dir, control.SocketName)
	for end := time.Now().Add(endWait); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			break
		}
		_ = conn.Close()
		if time.Now().After(end) { // it isn't that of the domain's last life, still writing its record
			return nil, fmt.Errorf("another shim serves domain %s (%s)", s.Name, s.UUID)
		}
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return nil, fmt.Errorf("clearing a dead shim's state: %w", err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		_ = os.RemoveAll(s.dir)
		return nil, fmt.Errorf("listening for requests: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	return listener, nil
}

func (s *shim) release() {
	_ = os.RemoveAll(s.dir)
}

// serveControl answers requests of the command line.
func (s *shim) serveControl(listener *net.UnixListener) {
	asked := make(chan struct{}, maxRequests)
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors or memory: it may pass
			continue
		}
		select {
		case asked <- struct{}{}:
		default: // the disk of the records hangs, or somebody plays: the monitor's descriptors are worth more
			_ = conn.Close()
			continue
		}
		go func() {
			defer func() { <-asked }()
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
		s.lookAtMetadata()
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
	case "anchor":
		a, err := s.domain.readAnchor()
		if err != nil {
			return control.Answer{Error: err.Error()}
		}
		return control.Answer{Anchor: &a}
	case "published":
		s.published.Store(time.Now().UnixNano())
		return control.Answer{}
	case "import":
		if r.Anchor == nil {
			return control.Answer{Error: "there is no anchor in the request"}
		}
		if err := s.domain.importAnchor(*r.Anchor, clockpage.Migrate); err != nil {
			return control.Answer{Error: err.Error()}
		}
	case "quit":
		if s.mode() == control.Relay && s.qemuLives() {
			return control.Answer{Error: "this shim carries the domain's monitor: it ends with the domain"}
		}
		s.domain.setPolicy(nil)
	default:
		return control.Answer{Error: fmt.Sprintf("unknown request %q; known are status, policy, anchor, published, import, quit", r.Do)}
	}
	status := &control.Status{
		Name: s.Name, UUID: s.UUID, Version: s.Version, Mode: s.mode(),
		Kept: s.domain.recorder.status(),
		Shim: os.Getpid(), Keeper: s.Store.KeeperPID(), Workers: s.domain.memory.Workers, Since: s.domain.memory.Since,
	}
	if at := s.published.Load(); at != 0 {
		status.Published = time.Unix(0, at)
	}
	s.domain.status(status, min(max(r.Records, 0), 256))
	return control.Answer{Status: status}
}
