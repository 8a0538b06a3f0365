package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

const (
	// How long we look for an idle main thread, and how often: less and less.
	longestWait = 30 * time.Second
	firstPause  = 200 * time.Microsecond
	lastPause   = 20 * time.Millisecond

	// What a system call that was interrupted returns inside the kernel, to be made again: include/linux/errno.h.
	restartSys, restartNoIntr, restartNoHand, restartBlock = -512, -513, -514, -516

	syscallInsn = 0x050f // little endian

	flagTrap, flagDirection, flagAlignment = 1 << 8, 1 << 10, 1 << 18
	// The flags that rt_sigreturn takes from the frame: FIX_EFLAGS of arch/x86/include/asm/sighandling.h.
	flagsRestored = 0x50dd5

	rtldNow = 2 // and RTLD_LOCAL, which is 0: bits/dlfcn.h

	maxReason = 4096
)

var errNotIdle = errors.New("main thread is not idle")

// inject has the process call dlopen, as soon as its main thread is idle.
func (s *subject) inject(ctx context.Context) (result Result, err error) {
	ctx, cancel := context.WithTimeout(ctx, longestWait)
	defer cancel()
	onOwnThread(func() {
		pause := firstPause
		for {
			result.Attempts++
			result.Stopped, err = s.attempt(ctx)
			if !errors.Is(err, errNotIdle) {
				return
			}
			select {
			case <-ctx.Done():
				err = fmt.Errorf("%w: not in ppoll in %d looks: %w", ErrBusy, result.Attempts, ctx.Err())
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, lastPause)
		}
	})
	return result, err
}

// onOwnThread runs f on a thread of its own, and returns when that has ended: whatever f still traced then has been let
// go by the kernel.
func onOwnThread(f func()) {
	done := make(chan int)
	go func() {
		runtime.LockOSThread()
		thread := unix.Gettid()
		if thread == unix.Getpid() {
			// The main thread doesn't end with its goroutine. While we hold it, the next goroutine gets another.
			onOwnThread(f)
			runtime.UnlockOSThread()
			thread = 0
		} else {
			f()
		}
		done <- thread
	}()
	thread := <-done
	for thread != 0 && unix.Tgkill(unix.Getpid(), thread, 0) == nil {
		time.Sleep(20 * time.Microsecond)
	}
}

// attempt looks at the main thread once, and calls dlopen if it is idle. It returns how long the thread was held.
func (s *subject) attempt(ctx context.Context) (time.Duration, error) {
	if err := s.peek(); err != nil {
		return 0, s.letGo(err)
	}
	t := &tracee{pid: s.pid}
	if err := t.seize(); err != nil {
		return 0, s.letGo(s.seizeError(err))
	}
	from := clock()
	if err := t.stop(ctx); err != nil {
		// The thread may run, and then can't be let go: that happens when ours ends.
		t.detach()
		return 0, err
	}
	err := s.call(t)
	t.detach()
	return clock() - from, err
}

// letGo turns ErrTraced into a reason to look again where nobody traces the process any more, or a thread of ours does that
// is about to end: a target that was killed while we held it is let go in the kernel's own time (seen with Linux 6.18).
func (s *subject) letGo(err error) error {
	if !errors.Is(err, ErrTraced) {
		return err
	}
	state, failed := readStatus(s.pid)
	if failed != nil {
		return failed
	}
	if state.tracer == 0 {
		return errNotIdle
	}
	if _, failed := os.Stat(fmt.Sprintf("/proc/self/task/%d", state.tracer)); failed == nil {
		return errNotIdle
	}
	return err
}

// peek asks what the main thread does without stopping it: a stop would cut short system calls that can't be made
// again.
func (s *subject) peek() error {
	if err := s.alive(); err != nil {
		return err
	}
	state, err := readStatus(s.pid)
	if err != nil {
		return err
	}
	if err := state.serves(); err != nil {
		return err
	}
	if idle, err := inPPoll(s.pid); err != nil || idle {
		return err
	}
	return errNotIdle
}

// inPPoll says whether the main thread waits in ppoll, as far as that can be seen: a kernel that doesn't tell may have it there.
func inPPoll(pid int) (bool, error) {
	content, err := readProc(pid, "syscall")
	if errors.Is(err, ErrGone) {
		return true, nil // gone in between, or a kernel that doesn't have it: the stop will tell
	}
	number, _, _ := strings.Cut(string(content), " ")
	return number == fmt.Sprint(unix.SYS_PPOLL), err
}

// alive says whether the process still is the one that was surveyed. A main thread may also end while others run on.
func (s *subject) alive() error {
	now, err := readStat(s.pid)
	if err != nil {
		return err
	}
	if now.Started != s.start || now.State == 'Z' || now.State == 'X' {
		return ErrGone
	}
	return nil
}

// seizeError finds the cause of what PTRACE_SEIZE has returned. EPERM has several: ptrace(2).
func (s *subject) seizeError(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	if err := s.alive(); err != nil {
		return err
	}
	switch state, err := readStatus(s.pid); {
	case err != nil:
		return err
	case state.tracer != 0:
		return tracedBy(state.tracer)
	}
	return refused()
}

// saved is how the thread was found.
type saved struct {
	regs   unix.PtraceRegs // to come back to
	mask   uint64
	xstate []byte
}

// call has the stopped thread call dlopen, if it is idle.
func (s *subject) call(t *tracee) error {
	found, err := t.registers()
	if err != nil {
		return err
	}
	if err := s.idle(t, &found); err != nil {
		return err
	}
	if err := s.alive(); err != nil {
		return err // what is stopped may be another process, with the same pid
	}
	code, err := t.peekCode(s.entry)
	if err != nil {
		return err
	}
	if err := s.checkStart(code); err != nil {
		return err
	}
	old := saved{regs: goingBack(found)}
	if old.mask, err = t.signalMask(); err != nil {
		return err
	}
	if old.xstate, err = t.xstate(); err != nil {
		return err
	}
	f, err := build(&old.regs, old.xstate, old.mask, s.library, xsaveLayout())
	if err != nil {
		return err
	}

	// Until the registers are set this is dead memory and dead code. A thread that is let go now makes its ppoll again.
	if _, err := s.mem.WriteAt(f.image, int64(f.context)); err != nil {
		return memoryError("writing the stack", err)
	}
	err = t.pokeCode(s.entry, s.stub())
	if err == nil {
		err = s.loadIn(t, &found, &old, &f)
	}
	if errors.Is(err, ErrGone) || t.underway {
		return err // a thread that is underway still needs the stub, and then no one
	}
	return also(err, t.pokeCode(s.entry, s.code))
}

// idle says whether the stopped thread can be borrowed: it has just left, or been stopped in, the system call ppoll, on
// its own stack.
func (s *subject) idle(t *tracee, regs *unix.PtraceRegs) error {
	const userCode64 = 0x33
	if regs.Orig_rax != unix.SYS_PPOLL || regs.Cs != userCode64 || int64(regs.Rax) == restartBlock {
		return errNotIdle
	}
	if regs.Rsp < s.stackLow || regs.Rsp >= s.stackHigh {
		return errNotIdle
	}
	insn, err := t.peek(regs.Rip - 2)
	if err != nil {
		return errNotIdle
	}
	if insn&0xffff != syscallInsn {
		return errNotIdle
	}
	return nil
}

// goingBack returns the registers to come back to: those that the thread would have in user space if nothing but the
// stop had happened.
func goingBack(regs unix.PtraceRegs) unix.PtraceRegs {
	switch int64(regs.Rax) {
	case restartSys, restartNoIntr, restartNoHand:
		regs.Rax = regs.Orig_rax
		regs.Rip -= 2 // the length of the instruction syscall
	}
	return regs
}

// dlopenIn calls dlopen, and dlerror if that fails.
func (s *subject) dlopenIn(t *tracee, found *unix.PtraceRegs, old *saved, f *frame) error {
	handle, err := s.run(t, found, old, f, "dlopen", f.path, rtldNow)
	if err != nil || handle != 0 {
		return err
	}
	now, err := t.registers()
	if err != nil {
		return err
	}
	text, err := s.run(t, &now, old, f, "dlerror", 0, 0)
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", ErrDlopen, s.reason(text))
}

// reason reads dlerror's text.
func (s *subject) reason(address uint64) string {
	if address == 0 || address >= userEnd {
		return "no reason given"
	}
	text := make([]byte, maxReason)
	n, _ := s.mem.ReadAt(text, int64(address)) // as far as memory goes
	until, _, _ := strings.Cut(string(text[:n]), "\x00")
	return host.OneLine(until)
}

// run has the thread call function, and waits until rt_sigreturn has brought it back. now are the registers that it
// has.
func (s *subject) run(
	t *tracee, now *unix.PtraceRegs, old *saved, f *frame, function string, arg1, arg2 uint64,
) (uint64, error) {
	regs := *now
	regs.Rax, regs.Rdi, regs.Rsi, regs.Rbx = s.functions[function], arg1, arg2, f.slot
	regs.Rip, regs.Rsp = s.entry, f.context
	regs.Eflags &^= flagTrap | flagDirection | flagAlignment
	regs.Orig_rax = ^uint64(0) // no system call, so nothing for the kernel to make again
	if err := t.setRegisters(&regs); err != nil {
		return 0, err
	}
	t.underway = true
	if err := t.setSignalMask(^uint64(0)); err != nil {
		back := t.setRegisters(now)
		t.underway = back != nil
		return 0, also(err, back)
	}
	if err := t.untilReturn(s.entry+uint64(len(stub)), f.context); err != nil {
		return 0, err
	}
	t.underway = false
	if err := t.compare(old); err != nil {
		return 0, err
	}
	var slot [wordSize]byte
	if _, err := s.mem.ReadAt(slot[:], int64(f.slot)); err != nil {
		return 0, memoryError("reading the result", err)
	}
	return binary.LittleEndian.Uint64(slot[:]), nil
}

// untilReturn lets the thread run to the end of the rt_sigreturn that is made at rip, with the stack pointer rsp.
func (t *tracee) untilReturn(rip, rsp uint64) error {
	signal := 0
	request := unix.PTRACE_SYSCALL
	for returning := false; ; {
		if err := t.resume(request, signal); err != nil {
			return err
		}
		stop, err := t.wait()
		if err != nil {
			return err
		}
		request, signal = unix.PTRACE_SYSCALL, 0
		switch stop.kind {
		case groupStop:
			request = unix.PTRACE_LISTEN // it stays stopped until SIGCONT
		case signalStop:
			// SIGSTOP, or a fault: nothing else gets through the mask.
			signal = stop.signal
		case syscallStop:
			if returning {
				return nil
			}
			regs, err := t.registers()
			if err != nil {
				return err
			}
			returning = regs.Orig_rax == unix.SYS_RT_SIGRETURN && regs.Rip == rip && regs.Rsp == rsp
		}
	}
}

// compare checks what rt_sigreturn has restored, and fixes it where it isn't what was saved.
func (t *tracee) compare(old *saved) error {
	regs, err := t.registers()
	if err != nil {
		return err
	}
	mask, err := t.signalMask()
	if err != nil {
		return err
	}
	xstate, err := t.xstate()
	if err != nil {
		return err
	}
	var wrong []string
	want := old.regs
	want.Orig_rax = regs.Orig_rax
	want.Eflags = regs.Eflags&^flagsRestored | want.Eflags&flagsRestored
	if regs != want {
		want.Orig_rax = ^uint64(0)
		wrong = append(wrong, "the general registers")
		err = also(err, t.setRegisters(&want))
	}
	if mask != old.mask {
		wrong = append(wrong, "the signal mask")
		err = also(err, t.setSignalMask(old.mask))
	}
	if !sameXstate(xstate, old.xstate) {
		wrong = append(wrong, "the XSAVE area")
		err = also(err, t.setXstate(old.xstate))
	}
	if wrong == nil {
		return nil
	}
	return also(fmt.Errorf("rt_sigreturn changed %s; put right by ptrace", strings.Join(wrong, " and ")), err)
}

// also joins two errors in one line.
func also(err, other error) error {
	switch {
	case err == nil:
		return other
	case other == nil:
		return err
	}
	return fmt.Errorf("%w; also: %w", err, other)
}

// clock is the time since some fixed one.
func clock() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &t) // fails for a clock that the kernel lacks: not this one
	return time.Duration(t.Nano())
}
