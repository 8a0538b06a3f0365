package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
)

// Why a process can't be served. Every error of Load and Check that has one of these causes wraps it.
var (
	// ErrNotQEMU: the process is no x86-64 QEMU, or it has no KVM virtual machine.
	ErrNotQEMU = errors.New("not a QEMU with a KVM virtual machine")
	// ErrNoSlot: the program has no ioctl slot that is bound at start, or no way to dlopen.
	ErrNoSlot = errors.New("nowhere for the module to hook in")
	// ErrTraced: somebody else traces the process. One tracer is all that the kernel allows.
	ErrTraced = errors.New("already traced")
	// ErrBusy: the main thread was never seen idle, in ppoll. Trying again later may help.
	ErrBusy = errors.New("main thread is never idle")
	// ErrGone: the process has ended, before or while it was attached to.
	ErrGone = errors.New("process is gone")
	// ErrShadowStack: the process runs with a user shadow stack, which no forged signal frame gets past.
	ErrShadowStack = errors.New("user shadow stack is active")
	// ErrRefused: the kernel doesn't let us look at the process or trace it.
	ErrRefused = errors.New("not permitted to trace")
	// ErrDlopen: dlopen ran and returned NULL. The text is dlerror's, made printable.
	ErrDlopen = errors.New("dlopen failed")
)

// Result is what a Load did.
type Result struct {
	// Already says that the module ran before: nothing was touched.
	Already bool
	// Stopped is how long the main thread was held: from the order to stop to the release, in which dlopen ran.
	Stopped time.Duration
	// Attempts counts the looks at the main thread, the successful one included.
	Attempts int
}

// pageLink is how the module's memfd shows in /proc/PID/fd (fs/d_path.c calls every memfd deleted).
const pageLink = "/memfd:ftclock-page (deleted)"

// Loaded reports whether the module runs in process pid, by its sign: the memfd of the clock page. fd is its number in
// that process. A module that was loaded but found no place for itself leaves no sign.
func Loaded(pid int) (fd int, ok bool, err error) {
	fd, err = findFD(pid, pageLink)
	if err != nil {
		return 0, false, fmt.Errorf("looking for the clock page of process %d: %w", pid, err)
	}
	if fd < 0 {
		return 0, false, nil
	}
	return fd, true, nil
}

// Check says whether Load could serve process pid with the library at path (as the process sees it), without touching
// the process.
func Check(pid int, path string) error {
	s, err := survey(pid, path, (*subject).isQEMU)
	if err != nil {
		return fmt.Errorf("attaching to process %d: %w", pid, err)
	}
	s.close()
	return nil
}

// Load has process pid, a QEMU, dlopen the library at path (as the process sees it), unless its module runs already. It
// waits for the main thread to be idle until ctx ends, 30 s at most; once dlopen runs, ctx is no longer asked. pid must
// not be a child that another goroutine waits for.
func Load(ctx context.Context, pid int, path string) (Result, error) {
	if _, ok, err := Loaded(pid); err != nil {
		return Result{}, err
	} else if ok {
		return Result{Already: true}, nil
	}
	result, err := load(ctx, pid, path, (*subject).isQEMU)
	if err != nil {
		return result, fmt.Errorf("attaching to process %d: %w", pid, err)
	}
	return result, nil
}

// load is Load for the programs that suits lets pass.
func load(ctx context.Context, pid int, path string, suits func(*subject) error) (Result, error) {
	s, err := survey(pid, path, suits)
	if err != nil {
		return Result{}, err
	}
	defer s.close()
	if err := s.warm(); err != nil {
		return Result{}, err
	}
	return s.inject(ctx)
}

// findFD returns the first descriptor of pid that links to link, or -1.
func findFD(pid int, link string) (int, error) {
	dir := procPath(pid, "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return -1, procError(err)
	}
	for _, entry := range entries {
		if target, err := os.Readlink(dir + "/" + entry.Name()); err == nil && target == link {
			return strconv.Atoi(entry.Name())
		}
	}
	return -1, nil
}
