package keeper

import (
	"bytes"
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

/*
Theory of operation

The keeper does for one worker what systemd does for a unit of Type=notify with Restart=always: it obeys FDSTORE=1, FDSTOREREMOVE=1,
READY=1 and STOPPING=1. When the worker dies, the keeper does what the worker's last messages ask for, and starts the next one with
every descriptor. The messages come by a socket pair, since a socket with an address could be taken away, or filled by others.

systemd doesn't die. The keeper may, so the worker has both ends of the pair open, and starts the next keeper with them and all that
it holds itself. What the last keeper hadn't read is read by the next one. The two are gone only if both die within the few
milliseconds that starting one of them takes.

An upgrade is a death on purpose: the keeper executes the new program in its own place and then kills the worker. The next worker is
the new program's.
*/

// Flag is the first argument of the keeper's command line; what follows is the worker's.
const Flag = "-keeper"

// ReadyName is the name of a pipe that a keeper may be started with. It says "ready\n" there when the worker is, and closes it.
const ReadyName = "ready"

// Names of the ends of the socket pair: what the worker tells the keeper by, and what the keeper reads.
const (
	socketName = "notify"
	queueName  = "queue"
)

// Names of a keeper's environment variables, beside those of Store.
const (
	envWorker  = "FTCLOCK_WORKER"  // the pid of the worker that there is already
	envUpgrade = "FTCLOCK_UPGRADE" // set for the program that a keeper executes in its own place
)

// watch starts a new keeper whenever the last one has died.
func (s *Store) watch() {
	begun, quick := time.Now(), 0 // the last keeper, and how many there were that died at once
	for {
		await(s.KeeperPID())
		quick = count(quick, begun)
		time.Sleep(pause(quick))
		for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			s.mu.Lock()
			if s.done {
				s.mu.Unlock()
				return
			}
			begun = time.Now()
			held := s.held.and(fds{socketName: s.socket, queueName: s.queue})
			pid, err := start(append([]string{Flag}, os.Args[1:]...), held, quick%2 == 1, envWorker+"="+strconv.Itoa(os.Getpid()))
			if err == nil {
				s.keeper = pid
				s.mu.Unlock()
				s.log("the keeper died and was replaced; nothing has to be done, unless it comes again")
				break
			}
			s.mu.Unlock()
			s.log("the keeper died, and replacing it fails: " + err.Error())
			time.Sleep(wait)
		}
	}
}

// await returns when a process has ended.
func await(pid int) {
	fd := openProcess(pid)
	if fd < 0 {
		return
	}
	host.AwaitEnd(fd)
	_ = unix.Close(fd)
}

// openProcess gives a pidfd; -1 if the process has ended and is buried. It waits for what the host is short of.
func openProcess(pid int) int {
	for {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			return fd
		}
		if errors.Is(err, unix.ESRCH) {
			return -1
		}
		time.Sleep(10 * time.Millisecond)
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

type keeper struct {
	mu     sync.Mutex
	held   fds
	socket int // the worker's end of the pair
	queue  int // the keeper's
	worker int // pid; 0: none
	ready  int // the pipe; -1: nobody waits
	log    func(string)

	stopping bool // the worker has said so
	upgraded bool // the next death of a worker is the keeper's own doing
}

// Keep is the keeper: it returns when the worker has finished.
func Keep(log func(string)) error {
	held, err := inherit()
	if err != nil {
		return err
	}
	k := &keeper{held: held, log: log, ready: -1}
	if fd, ok := held[ReadyName]; ok {
		k.ready = fd
		delete(held, ReadyName)
	}
	if k.worker, _ = strconv.Atoi(os.Getenv(envWorker)); k.worker > 0 {
		go bury(k.worker)
	}
	_ = os.Unsetenv(envWorker)
	k.upgraded = os.Getenv(envUpgrade) != ""
	_ = os.Unsetenv(envUpgrade)
	if fd, ok := held[queueName]; ok {
		k.queue, k.socket = fd, held[socketName]
		delete(held, queueName)
		delete(held, socketName)
	} else {
		ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socketpair", err)
		}
		k.socket, k.queue = ends[0], ends[1]
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for which := range signals {
			if which == syscall.SIGHUP {
				k.upgrade()
				continue
			}
			k.mu.Lock()
			if k.worker > 0 { // that is the worker's to decide
				_ = unix.Kill(k.worker, unix.SIGTERM)
			}
			k.mu.Unlock()
		}
	}()
	if k.upgraded {
		_ = unix.Kill(k.worker, unix.SIGKILL)
	}
	k.keep()
	return nil
}

// bury reaps a process that may be a child of this one: of a keeper's that was executed anew.
func bury(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (k *keeper) keep() {
	quick := 0 // how many workers died at once
	for {
		begun := time.Now()
		if k.worker == 0 {
			if err := k.start(quick%2 == 1); err != nil {
				k.log("starting the worker fails: " + err.Error())
				quick++
				time.Sleep(pause(quick))
				continue
			}
		}
		if k.serve() {
			return
		}
		if !k.upgraded {
			k.log("the worker died and is replaced; nothing has to be done, unless it comes again")
		}
		k.upgraded = false
		quick = count(quick, begun)
		time.Sleep(pause(quick))
	}
}

func (k *keeper) start(self bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	held := k.held.and(fds{socketName: k.socket, queueName: k.queue})
	pid, err := start(os.Args[2:], held, self, envKeeper+"="+strconv.Itoa(os.Getpid()))
	if err == nil {
		k.worker = pid
	}
	return err
}

// serve obeys the worker until that has ended, and says whether it has finished.
func (k *keeper) serve() (finished bool) {
	process := openProcess(k.worker)
	if process >= 0 {
		defer unix.Close(process)
	}
	for gone := process < 0; ; {
		// Nothing is taken from the queue but with the lock held: an upgrade in between would forget it.
		p := []unix.PollFd{{Fd: int32(k.queue), Events: unix.POLLIN}, {Fd: int32(process), Events: unix.POLLIN}}
		timeout := -1
		if gone {
			timeout = 0
		}
		if _, err := unix.Poll(p, timeout); err != nil {
			continue // EINTR
		}
		if p[0].Revents != 0 { // first what the worker has said, then its death
			k.mu.Lock()
			k.obey()
			k.mu.Unlock()
			continue
		}
		if gone {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.worker = 0
			return k.stopping
		}
		gone = p[1].Revents != 0
	}
}

// obey does what one message asks for. The caller holds k.mu.
func (k *keeper) obey() {
	message, fd := k.receive()
	defer func() {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}()
	is := func(line string) bool { return bytes.Contains(message, []byte("\n"+line+"\n")) }
	_, name, _ := strings.Cut(string(message), "\nFDNAME=")
	name, _, _ = strings.Cut(name, "\n")
	old, had := k.held[name]
	switch {
	case is("FDSTORE=1") && fd >= 0 && (had || len(k.held) < maxFDs):
		if had {
			_ = unix.Close(old)
		}
		k.held[name] = fd
		fd = -1
	case is("FDSTOREREMOVE=1") && had:
		_ = unix.Close(old)
		delete(k.held, name)
	case is("READY=1") && k.ready >= 0:
		_, _ = unix.Write(k.ready, []byte("ready\n"))
		_ = unix.Close(k.ready)
		k.ready = -1
	case is("STOPPING=1"):
		k.stopping = true
	}
}

// receive receives one message, between newlines; fd is -1 if none came with it.
func (k *keeper) receive() (message []byte, fd int) {
	buf, oob := make([]byte, 256), make([]byte, unix.CmsgSpace(4))
	buf[0], fd = '\n', -1
	n, oobn, _, _, err := unix.Recvmsg(k.queue, buf[1:len(buf)-1], oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return nil, -1
	}
	messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil && len(got) == 1 {
			fd = got[0]
		}
	}
	buf[1+n] = '\n'
	return buf[:n+2], fd
}

// upgrade executes the program's file, which may be a newer one, in this process's place. If it can't be executed, all
// stays as it is.
func (k *keeper) upgrade() {
	err := runs()
	if err == nil {
		k.mu.Lock()
		for k.worker == 0 { // between two workers
			k.mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			k.mu.Lock()
		}
		held := k.held.and(fds{socketName: k.socket, queueName: k.queue})
		if k.ready >= 0 {
			held[ReadyName] = k.ready
		}
		err = execute(held, envWorker+"="+strconv.Itoa(k.worker), envUpgrade+"=1")
		k.mu.Unlock()
	}
	k.log("not upgrading: " + err.Error())
}
