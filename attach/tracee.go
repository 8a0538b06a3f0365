package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracee is a seized thread. Its methods are for the thread that seized it. ESRCH means that it has
// been killed, as it is always stopped when they are called: ptrace(2).
type tracee struct {
	pid int
	// underway says that the thread's registers have been changed, and that rt_sigreturn has yet to bring them back.
	underway bool
}

type stopKind int

const (
	interruptStop stopKind = iota // our PTRACE_INTERRUPT, or the end of a group stop
	groupStop                     // SIGSTOP and its kin have stopped the process
	syscallStop                   // entry or exit
	signalStop                    // a signal is about to be delivered
)

type stop struct {
	kind   stopKind
	signal int
}

func (t *tracee) seize() error {
	return t.do("seizing the main thread", unix.PTRACE_SEIZE, 0, 0)
}

// wait waits for the next stop.
func (t *tracee) wait() (stop, error) {
	for {
		if s, ok, err := t.look(0); ok || err != nil {
			return s, err
		}
	}
}

// look returns the next stop, if there is one. With unix.WNOHANG it doesn't wait for it. The process's end is left for
// its parent to collect.
func (t *tracee) look(options int) (s stop, ok bool, err error) {
	var info unix.Siginfo
	err = unix.Waitid(unix.P_PID, t.pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|unix.WALL|options, nil)
	switch {
	case errors.Is(err, unix.EINTR):
		return stop{}, false, nil
	case errors.Is(err, unix.ECHILD):
		return stop{}, false, ErrGone
	case err != nil:
		return stop{}, false, os.NewSyscallError("waitid", err)
	case info.Signo == 0:
		return stop{}, false, nil
	}
	const exited, killed, dumped = 1, 2, 3 // CLD_ of sigaction(2)
	switch info.Code {
	case exited:
		return stop{}, false, fmt.Errorf("%w: it exited with status %d meanwhile", ErrGone, childStatus(&info))
	case killed, dumped:
		return stop{}, false, fmt.Errorf("%w: %v ended it meanwhile", ErrGone, unix.Signal(childStatus(&info)))
	}
	var status unix.WaitStatus
	pid, err := unix.Wait4(t.pid, &status, unix.WALL|unix.WNOHANG, nil)
	switch {
	case errors.Is(err, unix.ECHILD):
		return stop{}, false, ErrGone
	case err != nil && !errors.Is(err, unix.EINTR):
		return stop{}, false, os.NewSyscallError("wait4", err)
	case err != nil || pid == 0:
		return stop{}, false, nil
	case !status.Stopped():
		return stop{}, false, fmt.Errorf("%w: it ended meanwhile (wait status %#x)", ErrGone, uint32(status))
	}
	return classify(status), true, nil
}

// childStatus is si_status, which the unix package has no name for: it follows signo, errno, code, a gap, pid and uid.
func childStatus(info *unix.Siginfo) int32 {
	const offset = 24
	bytes := (*[unsafe.Sizeof(*info)]byte)(unsafe.Pointer(info))
	return int32(binary.LittleEndian.Uint32(bytes[offset:]))
}

// classify tells the stops of a seized tracee apart: ptrace(2), "Stopped states".
func classify(status unix.WaitStatus) stop {
	signal, event := int(status.StopSignal()), int(status>>16)
	switch {
	case event == unix.PTRACE_EVENT_STOP && signal == int(unix.SIGTRAP):
		return stop{kind: interruptStop}
	case event == unix.PTRACE_EVENT_STOP:
		return stop{kind: groupStop}
	case event == 0 && signal == int(unix.SIGTRAP)|0x80:
		return stop{kind: syscallStop}
	case event == 0:
		return stop{kind: signalStop, signal: signal}
	}
	return stop{kind: interruptStop} // an event that we haven't asked for
}

// stop stops the thread and sets the options, or gives up when ctx ends: a thread in an uninterruptible sleep may take
// its time.
func (t *tracee) stop(ctx context.Context) error {
	if err := t.do("interrupting the main thread", unix.PTRACE_INTERRUPT, 0, 0); err != nil {
		return err
	}
	const longest = time.Millisecond
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, longest) {
		s, ok, err := t.look(unix.WNOHANG)
		switch {
		case err != nil:
			return err
		case ok && s.kind == interruptStop:
			return t.do("setting options", unix.PTRACE_SETOPTIONS, 0, unix.PTRACE_O_TRACESYSGOOD)
		case ok && s.kind == groupStop:
			return fmt.Errorf("%w: the process has been stopped (SIGSTOP?); SIGCONT continues it", ErrBusy)
		case ok:
			// A signal comes first. The interrupt is still to come.
			if err := t.resume(unix.PTRACE_CONT, s.signal); err != nil {
				return err
			}
			continue
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: it doesn't stop: %w", ErrBusy, ctx.Err())
		}
		request := unix.NsecToTimespec(pause.Nanoseconds())
		_ = unix.Nanosleep(&request, nil) // woken early, we look early
	}
}

// resume lets the thread go on: PTRACE_CONT, PTRACE_SYSCALL or PTRACE_LISTEN, with a signal to deliver.
func (t *tracee) resume(request, signal int) error {
	return t.do("continuing the main thread", request, 0, uintptr(signal))
}

// detach lets the thread go if it is stopped. If it isn't, that happens when the tracing thread ends.
func (t *tracee) detach() { _ = t.do("letting the main thread go", unix.PTRACE_DETACH, 0, 0) }

func (t *tracee) registers() (regs unix.PtraceRegs, err error) {
	err = t.point("reading registers", unix.PTRACE_GETREGS, 0, unsafe.Pointer(&regs))
	return regs, err
}

func (t *tracee) setRegisters(regs *unix.PtraceRegs) error {
	return t.point("setting registers", unix.PTRACE_SETREGS, 0, unsafe.Pointer(regs))
}

func (t *tracee) signalMask() (mask uint64, err error) {
	err = t.point("reading the signal mask", unix.PTRACE_GETSIGMASK, unsafe.Sizeof(mask), unsafe.Pointer(&mask))
	return mask, err
}

func (t *tracee) setSignalMask(mask uint64) error {
	return t.point("setting the signal mask", unix.PTRACE_SETSIGMASK, unsafe.Sizeof(mask), unsafe.Pointer(&mask))
}

func (t *tracee) xstate() ([]byte, error) {
	area := make([]byte, xstateMaxBytes)
	vector := unix.Iovec{Base: &area[0], Len: uint64(len(area))}
	err := t.point("reading the XSAVE area", unix.PTRACE_GETREGSET, unix.NT_X86_XSTATE, unsafe.Pointer(&vector))
	if err != nil {
		return nil, err
	}
	return area[:min(vector.Len, xstateMaxBytes)], nil
}

func (t *tracee) setXstate(area []byte) error {
	vector := unix.Iovec{Base: &area[0], Len: uint64(len(area))}
	return t.point("setting the XSAVE area", unix.PTRACE_SETREGSET, unix.NT_X86_XSTATE, unsafe.Pointer(&vector))
}

func (t *tracee) peek(address uint64) (word uint64, err error) {
	err = t.point("reading code", unix.PTRACE_PEEKTEXT, uintptr(address), unsafe.Pointer(&word))
	return word, err
}

func (t *tracee) peekCode(address uint64) (code [stubRoom]byte, err error) {
	for at := 0; at < stubRoom; at += wordSize {
		word, err := t.peek(address + uint64(at))
		if err != nil {
			return code, err
		}
		binary.LittleEndian.PutUint64(code[at:], word)
	}
	return code, nil
}

func (t *tracee) pokeCode(address uint64, code [stubRoom]byte) error {
	for at := 0; at < stubRoom; at += wordSize {
		word := binary.LittleEndian.Uint64(code[at:])
		if err := t.do("writing code", unix.PTRACE_POKETEXT, uintptr(address)+uintptr(at), uintptr(word)); err != nil {
			return err
		}
	}
	return nil
}

// beforeRequest is called before every request. It is there for the test in which the tracer dies before each of them.
var beforeRequest = func() {}

func (t *tracee) do(what string, request int, address, data uintptr) error {
	beforeRequest()
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(t.pid), address, data, 0, 0)
	return requestError(what, errno)
}

// point is do for the requests that take a pointer.
func (t *tracee) point(what string, request int, address uintptr, data unsafe.Pointer) error {
	beforeRequest()
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(t.pid), address, uintptr(data), 0, 0)
	return requestError(what, errno)
}

func requestError(what string, errno unix.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.ESRCH:
		return fmt.Errorf("%w: killed while %s", ErrGone, what)
	}
	return fmt.Errorf("%s: %w", what, os.NewSyscallError("ptrace", errno))
}
