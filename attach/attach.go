package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
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
	// ErrNoVM: the process is a QEMU, and has no virtual machine. One that has just begun makes it soon, one on TCG never does. It is an
	// ErrNotQEMU, too.
	ErrNoVM = fmt.Errorf("%w", ErrNotQEMU)
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
func Check(pid int, path string) error { return checkBy(pid, path, survey) }

// CheckSealed is Check for LoadSealed.
func CheckSealed(pid int, path string) error { return checkBy(pid, path, surveySealed) }

// surveyor is survey or surveySealed.
type surveyor func(pid int, path string, suits func(*subject) error) (*subject, error)

func checkBy(pid int, path string, survey surveyor) error {
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
	return loadOnce(ctx, pid, path, survey)
}

// LoadSealed is Load for a process that may see other files than this one. path is as we see it: the process is given what
// is in the file, in a memory file that is sealed. It needs a /proc where it runs, and nothing is written there.
func LoadSealed(ctx context.Context, pid int, path string) (Result, error) {
	return loadOnce(ctx, pid, path, surveySealed)
}

func loadOnce(ctx context.Context, pid int, path string, survey surveyor) (Result, error) {
	if _, ok, err := Loaded(pid); err != nil {
		return Result{}, err
	} else if ok {
		return Result{Already: true}, nil
	}
	result, err := loadBy(ctx, pid, path, (*subject).isQEMU, survey)
	if err != nil {
		return result, fmt.Errorf("attaching to process %d: %w", pid, err)
	}
	return result, nil
}

// load is Load for the programs that suits lets pass.
func load(ctx context.Context, pid int, path string, suits func(*subject) error) (Result, error) {
	return loadBy(ctx, pid, path, suits, survey)
}

func loadBy(ctx context.Context, pid int, path string, suits func(*subject) error, survey surveyor) (Result, error) {
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

// Ready says whether process pid, a QEMU, could be attached to at this moment, as far as that can be seen at a glance and without
// touching it. The error wraps ErrNoVM or ErrBusy where it may be ready later.
func Ready(pid int) error {
	if err := hasVM(pid); err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	state, err := readStatus(pid)
	if err == nil {
		err = state.serves()
	}
	idle := false
	if err == nil {
		idle, err = inPPoll(pid)
	}
	if err == nil && !idle {
		err = ErrBusy
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}

// hasVM looks for a virtual machine among the descriptors of pid.
func hasVM(pid int) error {
	fd, err := findFD(pid, "anon_inode:kvm-vm")
	if err == nil && fd < 0 {
		err = fmt.Errorf("%w: it has no virtual machine open in KVM (does it run with TCG?)", ErrNoVM)
	}
	return err
}

// LoadedSealed reports whether the process has a library that LoadSealed gave it: a module of ours, by an earlier attach.
func LoadedSealed(pid int) (bool, error) {
	maps, err := readMaps(pid)
	if err != nil {
		return false, fmt.Errorf("looking for the module in process %d: %w", pid, err)
	}
	return slices.ContainsFunc(maps, func(m mapping) bool { return m.path == memoryLink }), nil
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
