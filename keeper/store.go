package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names of environment variables. The first four are systemd's: sd_listen_fds_with_names(3), sd_notify(3).
const (
	envFDs    = "LISTEN_FDS"
	envNames  = "LISTEN_FDNAMES"
	envPID    = "LISTEN_PID"
	envNotify = "NOTIFY_SOCKET"

	envFirst  = "FTCLOCK_FIRST_FD" // the number of the first descriptor, if it isn't 3
	envKeeper = "FTCLOCK_KEEPER"   // for a worker: the keeper's pid
)

// firstFD is the number of the first descriptor that a program is started with (SD_LISTEN_FDS_START in sd-daemon.h).
const firstFD = 3

// maxFDs bounds the named descriptors. The unit has FileDescriptorStoreMax= for it.
const maxFDs = 32

// sendWait bounds how long a manager that is busy is waited for.
const sendWait = 10 * time.Second

// versionWait bounds how long a new program may take to say its version before it is found not to run.
const versionWait = 10 * time.Second

// fds are descriptors by name.
type fds map[string]int

// inherit takes over what this process was started with, so that no other child will.
func inherit() (fds, error) {
	held := make(fds)
	count, names := os.Getenv(envFDs), strings.Split(os.Getenv(envNames), ":")
	first, pid := firstFD, os.Getenv(envPID)
	if text := os.Getenv(envFirst); text != "" {
		first, _ = strconv.Atoi(text)
	}
	for _, name := range []string{envFDs, envNames, envPID, envFirst} {
		_ = os.Unsetenv(name)
	}
	if count == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) { // another process's
		return held, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxFDs || n > len(names) || first < firstFD {
		return nil, fmt.Errorf("taking over descriptors: %s=%s, with %d names, from %d on", envFDs, count, len(names), first)
	}
	for i, name := range names[:n] {
		if _, err := unix.FcntlInt(uintptr(first+i), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("taking over descriptor %s: %w", name, os.NewSyscallError("fcntl", err))
		}
		held[name] = first + i
	}
	return held, nil
}

// and gives what is in either.
func (f fds) and(more fds) fds {
	all := maps.Clone(f)
	maps.Copy(all, more)
	return all
}

// list gives the names and the numbers of what is held, in the same order.
func (f fds) list() (names []string, numbers []int) {
	for name, fd := range f {
		names, numbers = append(names, name), append(numbers, fd)
	}
	return names, numbers
}

// A Store keeps a shim's descriptors beyond the shim's life.
type Store struct {
	mu      sync.Mutex
	held    fds
	socket  int           // to send from
	manager unix.Sockaddr // who is told; nil: nobody holds anything but this process
	queue   int           // the keeper's end, for the next keeper; -1: there is no keeper
	keeper  int           // its pid; 0: none
	done    bool
	log     func(string)
}

// Open takes over what this process was started with. A program that was started by hand has nobody who would start it again.
// log is told what goes wrong later.
func Open(log func(string)) (*Store, error) {
	held, err := inherit()
	if err != nil {
		return nil, err
	}
	s := &Store{held: held, socket: -1, log: log}
	s.keeper, _ = strconv.Atoi(os.Getenv(envKeeper))
	fd, kept := held[socketName]
	switch path := os.Getenv(envNotify); {
	case kept:
		s.socket, s.queue = fd, held[queueName]
		delete(held, socketName)
		delete(held, queueName)
		go s.watch()
	case path != "":
		s.manager = &unix.SockaddrUnix{Name: path}
		if s.socket, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return nil, os.NewSyscallError("socket", err)
		}
	default:
		return s, nil
	}
	timeout := unix.NsecToTimeval(sendWait.Nanoseconds())
	if err := unix.SetsockoptTimeval(s.socket, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	return s, nil
}

// tell sends the manager a message, with a descriptor if there is one. The caller holds s.mu.
func (s *Store) tell(fd int, lines ...string) {
	if s.socket < 0 {
		return
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	for {
		err := unix.Sendmsg(s.socket, []byte(strings.Join(lines, "\n")), rights, s.manager, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			s.log(fmt.Sprintf("telling who keeps this shim %q: %v; if this process dies, it may not be able to go on: see whether systemd hangs",
				strings.Join(lines, " "), err))
		}
		return
	}
}

// Get gives a descriptor that was put in, in this life or an earlier one; it stays the store's.
func (s *Store) Get(name string) (fd int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok = s.held[name]
	return fd, ok
}

// Put makes fd the store's, under a name of ASCII letters and dashes. One that had the name is closed.
func (s *Store) Put(name string, fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(name)
	s.held[name] = fd
	// Without FDPOLL=0 systemd lets go of a connection that the other side has closed.
	s.tell(fd, "FDSTORE=1", "FDNAME="+name, "FDPOLL=0")
}

// Drop closes a descriptor, for good.
func (s *Store) Drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(name)
}

func (s *Store) drop(name string) {
	if fd, ok := s.held[name]; ok {
		_ = unix.Close(fd)
		delete(s.held, name)
		s.tell(-1, "FDSTOREREMOVE=1", "FDNAME="+name)
	}
}

// KeeperPID gives the keeper's pid; 0 where systemd or nobody keeps the shim.
func (s *Store) KeeperPID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keeper
}

// Ready says that this process serves.
func (s *Store) Ready() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tell(-1, "READY=1")
}

// Done says that this process is about to end, and isn't to be started again.
func (s *Store) Done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
	s.tell(-1, "STOPPING=1")
}

// Upgrade executes the program's file, which may be a newer one, in this process's place, with all that is held. It returns only
// if that can't be done, and then all is as it was.
func (s *Store) Upgrade() error {
	if err := runs(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return execute(s.held)
}

// runs says whether the program's file, which may be a newer one, can be executed.
func runs() error {
	ctx, cancel := context.WithTimeout(context.Background(), versionWait)
	defer cancel()
	// With all that it will be given: another version may not know it.
	if out, err := exec.CommandContext(ctx, os.Args[0], append([]string{"-version"}, os.Args[1:]...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("the new program doesn't run: %w: %s", err, out)
	}
	return nil
}

// execute executes the program's file in this process's place. It returns only if that fails.
func execute(held fds, environment ...string) error {
	names, numbers := held.list()
	first := unused(len(numbers))
	defer func() {
		for i := range numbers {
			_ = unix.Close(first + i)
		}
	}()
	for i, fd := range numbers {
		if err := unix.Dup3(fd, first+i, 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	environment = append(os.Environ(), append(Passed(names), append(environment,
		envPID+"="+strconv.Itoa(os.Getpid()), envFirst+"="+strconv.Itoa(first))...)...)
	return os.NewSyscallError("execve", unix.Exec(os.Args[0], os.Args, environment))
}

// Passed is the environment of a process that is started with descriptors of these names, from number 3 on.
func Passed(names []string) []string {
	return []string{envFDs + "=" + strconv.Itoa(len(names)), envNames + "=" + strings.Join(names, ":")}
}

// unused finds so many numbers in a row that are no descriptor's. What is opened meanwhile gets the lowest number that is free,
// so these are high ones.
func unused(count int) (first int) {
	first = 256
	for fd := first; fd < first+count; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			first = fd + 1
		}
	}
	return first
}

// start starts this program's file as another process of the shim's, with what is held and these arguments. With self it is the
// program that runs here, whatever is in the file now.
func start(arguments []string, held fds, self bool, environment ...string) (pid int, err error) {
	cmd := exec.Command(os.Args[0], arguments...)
	if _, err := os.Stat(cmd.Path); err != nil || self {
		cmd.Path = "/proc/self/exe" // the package was removed, the domain runs on
	}
	names, numbers := held.list()
	for i, number := range numbers {
		// Duplicates, so that closing an os.File here closes nothing that is kept.
		fd, err := unix.FcntlInt(uintptr(number), unix.F_DUPFD_CLOEXEC, firstFD)
		if err != nil {
			return 0, os.NewSyscallError("fcntl", err)
		}
		f := os.NewFile(uintptr(fd), names[i])
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), append(Passed(names), environment...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting %s: %w", os.Args[0], err)
	}
	go func() { _ = cmd.Wait() }() // its end is seen by its pidfd: this only buries it
	return cmd.Process.Pid, nil
}
