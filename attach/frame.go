package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"golang.org/x/sys/unix"
)

// The stub: call *%rax; mov %rax,(%rbx); mov $15,%eax; syscall. 15 is rt_sigreturn, which expects the ucontext at %rsp.
const stub = "\xff\xd0" + "\x48\x89\x03" + "\xb8\x0f\x00\x00\x00" + "\x0f\x05"

const (
	wordSize = 8
	stubRoom = 16 // the stub in words
	redZone  = 128
)

// The signal frame: struct ucontext of include/uapi/asm-generic/ucontext.h and arch/x86/include/uapi/asm/ucontext.h,
// struct sigcontext_64 and struct _fpx_sw_bytes of arch/x86/include/uapi/asm/sigcontext.h.
const (
	ucFlags      = 0
	ucStackFlags = 24
	ucContext    = 40
	ucMask       = ucContext + 256
	ucSize       = 512 // 304, and room for the siginfo that rt_sigreturn expects to be readable behind it

	scCS      = ucContext + 144
	scSS      = ucContext + 150
	scFPState = ucContext + 184

	// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
	contextFlags = 1 | 2 | 4
	// No mode that do_sigaltstack knows: the alternate stack stays as it is.
	noAltStack = 4

	swReserved     = 464 // in the XSAVE area; also where the kernel's regset keeps XCR0
	xsaveHeader    = 512
	xsaveExtended  = 576
	xstateMagic1   = 0x46505853
	xstateMagic2   = 0x46505845
	xstateMaxBytes = 64 << 10

	componentX87, componentSSE, componentPKRU = 0, 1, 9
)

// extent is the place of an XSAVE component in the standard format.
type extent struct{ offset, size uint32 }

// xsaveLayout is the table of the processor's XSAVE components: CPUID leaf 0xd (Intel SDM volume 1, 13.5).
var xsaveLayout = sync.OnceValue(func() *[64]extent {
	layout := new([64]extent)
	if top, _, _, _ := cpuid(0, 0); top < 0xd {
		return layout
	}
	low, _, _, high := cpuid(0xd, 0)
	supported := uint64(high)<<32 | uint64(low)
	for i := uint32(2); i < 63; i++ {
		if supported&(1<<i) != 0 {
			size, offset, _, _ := cpuid(0xd, i)
			layout[i] = extent{offset, size}
		}
	}
	return layout
})

func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// frame is what we put on the stack of the thread, and where: from the bottom up a ucontext, the XSAVE area, the
// library's path and the slot for the result.
type frame struct {
	context uint64 // also the stack pointer of the call
	path    uint64
	slot    uint64
	image   []byte // from context on
}

// build makes the frame that brings the thread back to the registers regs, the XSAVE area xstate (of NT_X86_XSTATE) and
// the signal mask.
func build(regs *unix.PtraceRegs, xstate []byte, mask uint64, path string, layout *[64]extent) (frame, error) {
	if len(xstate) < xsaveExtended || len(xstate) > xstateMaxBytes {
		return frame{}, fmt.Errorf("the kernel's XSAVE area has %d bytes", len(xstate))
	}
	fpstate, err := sigframeXstate(xstate, layout)
	if err != nil {
		return frame{}, err
	}
	const align = ^uint64(63)
	var f frame
	f.slot = (regs.Rsp-redZone)&align - 64
	f.path = (f.slot - uint64(len(path)+1)) & align
	fp := (f.path - uint64(len(fpstate))) & align
	f.context = fp - ucSize
	if regs.Rsp >= userEnd || f.context >= regs.Rsp {
		return frame{}, errors.New("the stack pointer is no address")
	}
	f.image = make([]byte, f.slot+wordSize-f.context)
	copy(f.image[fp-f.context:], fpstate)
	copy(f.image[f.path-f.context:], path)

	put := func(at int, value uint64) { binary.LittleEndian.PutUint64(f.image[at:], value) }
	put(ucFlags, contextFlags)
	put(ucStackFlags, noAltStack)
	for i, value := range []uint64{
		regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15, regs.Rdi, regs.Rsi,
		regs.Rbp, regs.Rbx, regs.Rdx, regs.Rax, regs.Rcx, regs.Rsp, regs.Rip, regs.Eflags,
	} {
		put(ucContext+i*wordSize, value)
	}
	binary.LittleEndian.PutUint16(f.image[scCS:], uint16(regs.Cs))
	binary.LittleEndian.PutUint16(f.image[scSS:], uint16(regs.Ss))
	put(scFPState, fp)
	put(ucMask, mask)
	return f, nil
}

// sigframeXstate makes the XSAVE area of a signal frame out of the kernel's regset.
//
// Kernels differ in where they look for the second magic number, without which all but the SSE registers are lost: at
// the size that the frame states, or (Linux 6.16 and some later) at the thread's own size, which no interface tells:
// with AMX it is less than the regset's. Both lie at or behind the end of the last component in use, and XRSTOR doesn't
// read components that aren't. So the number fills all that is behind.
func sigframeXstate(xstate []byte, layout *[64]extent) ([]byte, error) {
	le := binary.LittleEndian
	features := le.Uint64(xstate[swReserved:])
	inUse := le.Uint64(xstate[xsaveHeader:])
	// As the kernel does in its own frames: what isn't in use has its initial value in the area. PKRU is in the area
	// even if the header doesn't say so.
	inUse |= 1<<componentX87 | 1<<componentSSE | features&(1<<componentPKRU)
	end := xsaveExtended
	for rest := inUse &^ 3; rest != 0; rest &= rest - 1 {
		i := bits.TrailingZeros64(rest)
		component := layout[i]
		if component.offset < xsaveExtended || uint64(component.offset)+uint64(component.size) > uint64(len(xstate)) {
			return nil, fmt.Errorf("XSAVE component %d has no place in the kernel's area", i)
		}
		end = max(end, int(component.offset+component.size))
	}
	area := make([]byte, len(xstate)+4)
	copy(area, xstate[:end])
	for at := end; at+4 <= len(area); at += 4 {
		le.PutUint32(area[at:], xstateMagic2)
	}
	clear(area[swReserved:xsaveHeader])
	le.PutUint32(area[swReserved:], xstateMagic1)
	le.PutUint32(area[swReserved+4:], uint32(end)+4)
	le.PutUint64(area[swReserved+8:], features)
	le.PutUint32(area[swReserved+16:], uint32(end))
	le.PutUint64(area[xsaveHeader:], inUse)
	return area, nil
}

// sameXstate compares the values of two XSAVE areas of the regset. It leaves out what says how they were saved, and the
// x87 pointers of the last exception, which some AMD processors keep only while one is pending (AMD APM volume 2,
// 11.4.4).
func sameXstate(a, b []byte) bool {
	if len(a) != len(b) || len(a) < xsaveExtended {
		return false
	}
	const pointers, pointersEnd = 6, 24
	return string(a[:pointers]) == string(b[:pointers]) &&
		string(a[pointersEnd:swReserved]) == string(b[pointersEnd:swReserved]) &&
		string(a[xsaveExtended:]) == string(b[xsaveExtended:])
}
