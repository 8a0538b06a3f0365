package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

/*
Theory of operation

The two processes are joined by a socket pair, the line. The worker sends each new descriptor along the line, under a
name; from then on it is open in both. A process sees the other's death as the line's end.

When the worker dies, the keeper starts the next one, which inherits every descriptor. When the keeper dies, the
worker starts the next one in the same way, and goes on. A worker that has finished says so before it ends, and the
keeper ends as well.

An upgrade is a death on purpose: the keeper executes the new program in its own place, with all descriptors and the line,
and then kills the worker. The next worker is the new program's. Since a worker can die at any moment, it can
be upgraded at any moment.

The pair is gone only if both die within the few milliseconds that starting one of them takes.
*/

// Names of environment variables with which a process of the pair finds what it has inherited.
const (
	EnvFDs  = "FTCLOCK_FDS"  // name=number, separated by commas
	envLine = "FTCLOCK_LINE" // number of the line
	envPeer = "FTCLOCK_PEER" // pid of the other one, 0 if it is to be started
)

// Flags with which the program is started in its two parts. Both come first among the arguments.
const (
	KeeperFlag = "-keeper"
	WorkerFlag = "-worker"
)

// versionWait bounds how long a new program may take to say its version before it is found not to run.
const versionWait = 10 * time.Second

// maxFDs bounds the named descriptors.
const maxFDs = 32

// Messages on the line: a word, and for the first two a name behind it.
const (
	msgPut  = "put "  // with a descriptor
	msgDrop = "drop " // worker to keeper
	msgDone = "done"  // the worker has finished: so has the keeper
	msgTerm = "term"  // keeper to worker: somebody asks the pair to end
)

// fds are descriptors by name.
type fds map[string]int

// inherit takes over what the environment names, so that no other child will.
func inherit() (held fds, line, peer int, err error) {
	held = make(fds)
	defer func() {
		for _, name := range []string{EnvFDs, envLine, envPeer} {
			_ = os.Unsetenv(name)
		}
	}()
	for _, entry := range strings.Split(os.Getenv(EnvFDs), ",") {
		if entry == "" {
			continue
		}
		name, number, _ := strings.Cut(entry, "=")
		fd, err := strconv.Atoi(number)
		if err != nil || fd < 3 || name == "" || len(held) == maxFDs {
			return nil, 0, 0, fmt.Errorf("reading inherited descriptors: %q", entry)
		}
		syscall.CloseOnExec(fd)
		held[name] = fd
	}
	line = -1
	if text := os.Getenv(envLine); text != "" {
		if line, err = strconv.Atoi(text); err != nil {
			return nil, 0, 0, fmt.Errorf("reading the inherited line: %w", err)
		}
		syscall.CloseOnExec(line)
	}
	peer, _ = strconv.Atoi(os.Getenv(envPeer))
	return held, line, peer, nil
}

// environment is what the next process of the pair needs, its descriptors being numbered as given.
func environment(numbers fds, line, peer int) []string {
	var entries []string
	for name, fd := range numbers {
		entries = append(entries, name+"="+strconv.Itoa(fd))
	}
	sort.Strings(entries)
	return append(os.Environ(), EnvFDs+"="+strings.Join(entries, ","), envLine+"="+strconv.Itoa(line), envPeer+"="+strconv.Itoa(peer))
}

// start starts this program's file as the other part, with all descriptors and one end of a new line. The other end
// is returned. With self it is the program that runs here, whatever is in the file now.
func start(flag string, held fds, peer int, self bool) (line int, pid int, err error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, 0, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "line")
	defer theirs.Close()
	cmd := exec.Command(os.Args[0], append([]string{flag}, arguments()...)...)
	if _, err := os.Stat(cmd.Path); err != nil || self {
		cmd.Path = "/proc/self/exe" // the package was removed, the domain runs on
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	numbers := make(fds)
	var names []string
	for name := range held {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		// Duplicates, so that closing an os.File here closes nothing that is kept.
		fd, err := unix.FcntlInt(uintptr(held[name]), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			_ = unix.Close(ends[0])
			return -1, 0, os.NewSyscallError("fcntl", err)
		}
		f := os.NewFile(uintptr(fd), name)
		defer f.Close()
		numbers[name] = 3 + len(cmd.ExtraFiles)
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Env = environment(numbers, 3, peer)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		_ = unix.Close(ends[0])
		return -1, 0, fmt.Errorf("starting %s %s: %w", os.Args[0], flag, err)
	}
	go func() { _ = cmd.Wait() }() // its death is told by the line: this only buries it
	return ends[0], cmd.Process.Pid, nil
}

// arguments are this program's without the part's flag.
func arguments() []string {
	args := os.Args[1:]
	if len(args) > 0 && (args[0] == KeeperFlag || args[0] == WorkerFlag) {
		args = args[1:]
	}
	return args
}

// say sends one message. A line whose other end is gone is no error here: its reader sees that, too.
func say(line int, message string, fd int) {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	for {
		err := unix.Sendmsg(line, []byte(message), oob, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// hear receives one message; the descriptor is -1 if there is none. An end of the line is an empty message.
func hear(line int) (message string, fd int) {
	buf, oob := make([]byte, 128), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(line, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNRESET) {
			continue // reset: the other died with something unread, and what it said before comes now
		}
		if err != nil || n == 0 {
			return "", -1
		}
		fd = -1
		if oobn > 0 {
			if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) == 1 {
				if got, err := unix.ParseUnixRights(&messages[0]); err == nil && len(got) == 1 {
					fd = got[0]
				}
			}
		}
		return string(buf[:n]), fd
	}
}

// bury reaps a process that may be a child of this one: of a keeper's that was executed anew.
func bury(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// A Store is the worker's side: what it puts in survives it.
type Store struct {
	mu     sync.Mutex
	held   fds
	line   int
	Keeper int // pid
	// Term is closed when somebody asks the pair to end by a signal to the keeper.
	Term chan struct{}
	term sync.Once
	// Log is told of what happens to the keeper.
	Log func(string)
}

// Open takes over what this process has inherited, as a worker. Without a keeper, none is started: for a program that
// was started by hand.
func Open(log func(string)) (*Store, error) {
	held, line, peer, err := inherit()
	if err != nil {
		return nil, err
	}
	s := &Store{held: held, line: line, Keeper: peer, Term: make(chan struct{}), Log: log}
	if line >= 0 {
		go s.listen()
	}
	return s, nil
}

// listen waits for messages, and for the keeper's death.
func (s *Store) listen() {
	line := s.line
	begun, quick := time.Now(), 0 // the last keeper, and how many there were that died at once
	for {
		message, fd := hear(line)
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		if message == msgTerm {
			s.term.Do(func() { close(s.Term) })
		}
		if message != "" {
			continue
		}
		quick = count(quick, begun)
		time.Sleep(pause(quick))
		for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			s.mu.Lock()
			if s.line < 0 { // we have finished
				s.mu.Unlock()
				return
			}
			begun = time.Now()
			next, pid, err := start(KeeperFlag, s.held, os.Getpid(), quick%2 == 1)
			if err == nil {
				_ = unix.Close(s.line)
				s.line, s.Keeper, line = next, pid, next
				s.mu.Unlock()
				s.Log("the keeper died and was replaced; nothing has to be done, unless it comes again")
				break
			}
			s.mu.Unlock()
			s.Log("the keeper died, and replacing it fails: " + err.Error())
			time.Sleep(wait)
		}
	}
}

// count counts those that died within a second after they were begun, one after the other.
func count(quick int, begun time.Time) int {
	if time.Since(begun) > time.Second {
		return 0
	}
	return quick + 1
}

// pause is how long the next one is waited with: who dies again and again must not take a whole processor. Every second try is made with
// the program that runs here, as the file's may be one that can't do it.
func pause(quick int) time.Duration {
	if quick < 2 {
		return 0
	}
	return min(time.Millisecond<<(min(quick, 10)-2), 50*time.Millisecond)
}

// Get gives a descriptor that was put in, in this life or an earlier one; it stays the store's.
func (s *Store) Get(name string) (fd int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok = s.held[name]
	return fd, ok
}

// Put makes fd the store's, under a name. One that had the name is closed.
func (s *Store) Put(name string, fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.held[name]; ok {
		_ = unix.Close(old)
	}
	s.held[name] = fd
	if s.line >= 0 {
		say(s.line, msgPut+name, fd)
	}
}

// Drop closes a descriptor, in the keeper too.
func (s *Store) Drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fd, ok := s.held[name]; ok {
		_ = unix.Close(fd)
		delete(s.held, name)
		if s.line >= 0 {
			say(s.line, msgDrop+name, -1)
		}
	}
}

// KeeperPID gives the keeper's pid; 0 without one.
func (s *Store) KeeperPID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Keeper
}

// Done has the keeper end: the worker has finished, and will end next.
func (s *Store) Done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.line >= 0 {
		say(s.line, msgDone, -1)
		s.line = -1
	}
}

// Keep is the keeper: it returns when the worker has finished. It has to be called early in main: the descriptors that
// the environment names are the program's own.
func Keep(log func(string)) error {
	held, line, peer, err := inherit()
	if err != nil {
		return err
	}
	k := &keeper{held: held, line: line, worker: peer, log: log}
	if peer > 0 {
		go bury(peer)
	}
	upgrade := make(chan os.Signal, 1)
	signal.Notify(upgrade, syscall.SIGHUP)
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for {
			select {
			case <-upgrade:
				k.upgrade()
			case <-terms:
				k.mu.Lock()
				say(k.line, msgTerm, -1)
				k.mu.Unlock()
			}
		}
	}()
	if line >= 0 && os.Getenv(envUpgrade) != "" {
		_ = os.Unsetenv(envUpgrade)
		k.upgraded = true
		_ = unix.Kill(k.worker, unix.SIGKILL)
	}
	return k.keep()
}

// envUpgrade is set for the program that a keeper executes in its own place.
const envUpgrade = "FTCLOCK_UPGRADE"

type keeper struct {
	mu     sync.Mutex
	held   fds
	line   int
	worker int // pid
	log    func(string)

	upgraded bool // the next death of a worker is the keeper's own doing
}

func (k *keeper) keep() error {
	quick := 0 // how many workers died at once
	for {
		if k.line < 0 {
			time.Sleep(pause(quick))
			begun := time.Now()
			k.mu.Lock()
			line, pid, err := start(WorkerFlag, k.held, os.Getpid(), quick%2 == 1)
			if err == nil {
				k.line, k.worker = line, pid
			}
			k.mu.Unlock()
			if err != nil {
				k.log("starting the worker fails: " + err.Error())
			} else if k.serve() {
				return nil
			} else {
				k.died()
			}
			quick = count(quick, begun)
			continue
		}
		if k.serve() {
			return nil
		}
		k.died()
	}
}

// died says that the worker did, unless that was asked for.
func (k *keeper) died() {
	if !k.upgraded {
		k.log("the worker died and is replaced; nothing has to be done, unless it comes again")
	}
	k.upgraded = false
}

// serve does what the worker says until it has finished (true) or died.
func (k *keeper) serve() (finished bool) {
	for {
		// Nothing is taken from the line but with the lock held: an upgrade in between would forget it.
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(k.line), Events: unix.POLLIN}}, -1); err != nil {
			continue // EINTR
		}
		k.mu.Lock()
		message, fd := hear(k.line)
		switch name, put := strings.CutPrefix(message, msgPut); {
		case put && fd >= 0 && (len(k.held) < maxFDs || k.held[name] != 0):
			if old, ok := k.held[name]; ok {
				_ = unix.Close(old)
			}
			k.held[name] = fd
			fd = -1
		case strings.HasPrefix(message, msgDrop):
			name := strings.TrimPrefix(message, msgDrop)
			if old, ok := k.held[name]; ok {
				_ = unix.Close(old)
				delete(k.held, name)
			}
		case message == msgDone:
			k.mu.Unlock()
			return true
		case message == "":
			_ = unix.Close(k.line)
			k.line = -1
			k.mu.Unlock()
			return false
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		k.mu.Unlock()
	}
}

// upgrade executes the program's file, which may be a newer one, in this process's place. If it can't be executed, all
// stays as it is.
func (k *keeper) upgrade() {
	ctx, cancel := context.WithTimeout(context.Background(), versionWait)
	defer cancel()
	// With all that it will be given: another version may not know it.
	if out, err := exec.CommandContext(ctx, os.Args[0], append(arguments(), "-version")...).CombinedOutput(); err != nil {
		k.log(fmt.Sprintf("not upgrading: the new program doesn't run: %v: %s", err, out))
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for k.line < 0 { // between two workers
		k.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		k.mu.Lock()
	}
	for _, fd := range k.held {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
	}
	_, _ = unix.FcntlInt(uintptr(k.line), unix.F_SETFD, 0)
	env := append(environment(k.held, k.line, k.worker), envUpgrade+"=1")
	err := unix.Exec(os.Args[0], append([]string{os.Args[0], KeeperFlag}, arguments()...), env)
	for _, fd := range k.held {
		syscall.CloseOnExec(fd)
	}
	syscall.CloseOnExec(k.line)
	k.log("not upgrading: " + err.Error())
}
