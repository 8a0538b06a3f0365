// Package attach loads ftclock's module into a QEMU that already runs, by ptrace. It is for the
// shim and for `ftclock enable --live`. It is not a debugger, and not a loader for other programs:
// it knows one thread (QEMU's main thread), one place (the main loop's ppoll) and one machine
// (Linux on x86-64).
//
// # Theory of operation
//
// A QEMU that crashes is a guest's outage. So the package makes one promise: the tracer may die at
// any instruction, and QEMU runs on with every register as it was. The kernel does the restoring.
// When a signal handler ends, rt_sigreturn takes all registers from a frame on the stack. We put
// such a frame on the stack of the main thread and make the thread call dlopen, and rt_sigreturn
// after it. From the moment that the thread's registers change, all that it needs to return is in
// QEMU's own memory, and the tracer is no longer needed.
//
//  1. Whatever can be found out in advance is: the addresses of dlopen and dlerror (from the C
//     library's file and the memory map), the bytes of the program's entry point, and whether the
//     process may read the library. The library is read once, so that the page cache has it.
//  2. The main thread is stopped (PTRACE_SEIZE, PTRACE_INTERRUPT), and only the main thread. It
//     must be in ppoll, on its own stack: there it holds no lock of the allocator or of the dynamic
//     linker, so dlopen can't deadlock. If it is elsewhere it is released and checked again later.
//     To leave a busy QEMU alone, /proc/PID/syscall is read first.
//  3. Below the red zone of its stack, in memory that the ABI calls dead, go the library's path, a
//     slot for the result and the frame: general registers, XSAVE area, signal mask. A ppoll that
//     the stop has interrupted is wound back, so that it runs again with the rest of its timeout.
//     The kernel does the same for a thread that is stopped and continued.
//  4. Over the start of _start, dead since the program's first microsecond, go twelve bytes: call,
//     store the result, rt_sigreturn. They are written only where the program's own bytes are
//     found, or these twelve, left by a tracer that died.
//  5. The registers are set, in one system call. Then all signals are blocked, so that no handler
//     runs inside dlopen. The other way round, a death between the two would leave QEMU with its
//     signals blocked for ever. This way it leaves a dlopen that a handler may interrupt, as
//     handlers do, and rt_sigreturn takes the mask from the frame in either case.
//  6. The thread runs under PTRACE_SYSCALL until rt_sigreturn returns. There its registers, XSAVE
//     area and mask are compared with what was saved, _start gets its own bytes back, and the
//     thread is released. If dlopen returned NULL the thread first calls dlerror, over the same
//     frame.
//
// A process may live where it doesn't see the library: in a container, in another mount namespace.
// LoadSealed has it make a memory file first, by three more calls like the one of dlopen, writes the
// library into that and seals it, and has dlopen open it by its name in /proc/self/fd. The process
// closes it behind that, so that the mapping is all that stays.
//
// A dead tracer can leave some kilobytes below the stack pointer, up to twelve bytes in _start,
// which the next Load restores, and a memory file among the descriptors. PTRACE_O_TRACESYSGOOD is part of the promise: a tracee whose tracer
// dies in a system call stop is sent the number of that stop as a signal, and only with that option
// the number (SIGTRAP|0x80) is no signal.
//
// Nothing cuts a running dlopen short, not even a deadline: it ends, or QEMU does.
//
// Two traces remain. errno of the main thread may change, as it may in any ppoll. And a signal that
// comes while the thread is held is handled just before the repeated ppoll instead of inside it, as
// if it had come a moment earlier.
//
// # Sources
//
// The layout of the frame and what rt_sigreturn does with it: Linux, arch/x86/kernel/signal_64.c,
// arch/x86/kernel/fpu/signal.c, arch/x86/include/uapi/asm/sigcontext.h. Stops and their sequence:
// ptrace(2), kernel/signal.c, kernel/ptrace.c, include/linux/ptrace.h. Making ppoll again:
// fs/select.c. Arguments, alignment and red zone: the System V ABI for AMD64.
package attach
