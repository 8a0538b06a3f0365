// Needed by: the anchor and the module's write. The anchor is taken when
// KVM_GET_CLOCK says that the clock is stable, which it doesn't say before a
// vCPU ran; it then gives the clock, CLOCK_REALTIME and the TSC of one
// instant. KVM's clock goes on while no vCPU runs, so that dropping QEMU's
// write leaves it right. KVM_CLOCK_REALTIME in a write adds the time since,
// so that the module must clear it in what it writes. KVM_KVMCLOCK_CTRL, which
// QEMU makes on each vCPU behind its write, fails with EINVAL unless the guest
// has switched kvmclock on: so the module knows.

package hypervisor

import (
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"ftclock/test/guest"

	"golang.org/x/sys/unix"
)

// From the kernel's include/uapi/linux/kvm.h.
const (
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetClock            = 0x4030ae7b
	kvmGetClock            = 0x8030ae7c
	kvmSetMSRs             = 0x4008ae89
	kvmClockCtrl           = 0xaead

	kvmExitHLT = 5

	clockTSCStable = 2
	clockRealtime  = 4
	clockHostTSC   = 8
)

type kvmClockData struct {
	clock    uint64
	flags    uint32
	_        uint32
	realtime uint64
	hostTSC  uint64
	_        [4]uint32
}

func ioctl(fd int, request uintptr, argument unsafe.Pointer) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument))
	for errno == unix.EINTR && request == kvmCreateVM { // the runtime's own signal to preempt a goroutine does it
		r, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument))
	}
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func must(t *testing.T, what string, n int, err error) int {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return n
}

// vm is a machine with one vCPU whose only instruction is hlt, at the reset vector.
type vm struct {
	fd, vcpu int
	run      []byte
}

func newVM(t *testing.T) *vm {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, "opening /dev/kvm", kvm, err)
	t.Cleanup(func() { unix.Close(kvm) })
	fd, err := ioctl(kvm, kvmCreateVM, nil)
	must(t, "KVM_CREATE_VM", fd, err)
	t.Cleanup(func() { unix.Close(fd) })
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	must(t, "mmap", 0, err)
	t.Cleanup(func() { unix.Munmap(page) })
	page[0xff0] = 0xf4 // hlt
	region := struct {
		slot, flags       uint32
		guest, size, host uint64
	}{0, 0, 0xfffff000, 4096, uint64(uintptr(unsafe.Pointer(&page[0])))}
	_, err = ioctl(fd, kvmSetUserMemoryRegion, unsafe.Pointer(&region))
	must(t, "KVM_SET_USER_MEMORY_REGION", 0, err)
	vcpu, err := ioctl(fd, kvmCreateVCPU, nil)
	must(t, "KVM_CREATE_VCPU", vcpu, err)
	t.Cleanup(func() { unix.Close(vcpu) })
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, nil)
	must(t, "KVM_GET_VCPU_MMAP_SIZE", size, err)
	run, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, "mmap of the vCPU", 0, err)
	t.Cleanup(func() { unix.Munmap(run) })
	return &vm{fd: fd, vcpu: vcpu, run: run}
}

func (v *vm) getClock(t *testing.T) kvmClockData {
	t.Helper()
	var c kvmClockData
	_, err := ioctl(v.fd, kvmGetClock, unsafe.Pointer(&c))
	must(t, "KVM_GET_CLOCK", 0, err)
	return c
}

// runOnce runs the vCPU to its hlt.
func (v *vm) runOnce(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		_, err := ioctl(v.vcpu, kvmRun, nil)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		must(t, "KVM_RUN", 0, err)
		break
	}
	if reason := *(*uint32)(unsafe.Pointer(&v.run[8])); reason != kvmExitHLT {
		t.Fatalf("vCPU ended for reason %d", reason)
	}
}

func TestKVMClockIsStableOnceAVCPURan(t *testing.T) {
	v := newVM(t)
	if c := v.getClock(t); c.flags&clockTSCStable != 0 {
		t.Errorf("flags before a vCPU ran: %#x", c.flags)
	}
	v.runOnce(t)
	c := v.getClock(t)
	t.Logf("flags after a vCPU ran: %#x", c.flags)
	if c.flags&clockTSCStable == 0 {
		source, _ := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
		t.Skipf("KVM doesn't call its clock stable; fix: a machine whose clocksource is tsc, this one's is %s", source)
	}
	// Linux 5.16 and later.
	if c.flags&clockRealtime == 0 || c.flags&clockHostTSC == 0 || c.realtime == 0 || c.hostTSC == 0 {
		t.Errorf("no CLOCK_REALTIME and TSC along with the clock: %+v", c)
	}
}

func TestKVMClockGoesOnWithoutAVCPU(t *testing.T) {
	v := newVM(t)
	v.runOnce(t)
	get := func() (early, clock, late int64) {
		early = guest.Raw()
		clock = int64(v.getClock(t).clock)
		return early, clock, guest.Raw()
	}
	early1, clock1, late1 := get()
	time.Sleep(500 * time.Millisecond)
	early2, clock2, late2 := get()
	// The rates of kvmclock and CLOCK_MONOTONIC_RAW differ by up to 230 ns a second.
	const rates = 1000
	if went := clock2 - clock1; went < early2-late1-rates || went > late2-early1+rates {
		t.Errorf("clock went %d ns, CLOCK_MONOTONIC_RAW between %d and %d", went, early2-late1, late2-early1)
	}
}

func TestKVMRealtimeFlagAddsToAWrite(t *testing.T) {
	v := newVM(t)
	v.runOnce(t)
	now := v.getClock(t)
	if now.flags&clockRealtime == 0 {
		t.Skip("KVM gives no CLOCK_REALTIME; fix: Linux 5.16 or later, clocksource tsc")
	}
	const since = 10_000_000_000
	for _, c := range []struct {
		flags uint32
		adds  uint64
	}{{0, 0}, {clockRealtime, since}} {
		write := kvmClockData{clock: 100 * since, flags: c.flags, realtime: v.getClock(t).realtime - since}
		_, err := ioctl(v.fd, kvmSetClock, unsafe.Pointer(&write))
		must(t, "KVM_SET_CLOCK", 0, err)
		// Half of it for what passes between the ioctls.
		if got := v.getClock(t).clock - write.clock; got < c.adds || got > c.adds+since/2 {
			t.Errorf("flags %#x: clock is %d ns above what was written, not %d", c.flags, got, c.adds)
		}
	}
}

func TestKVMControlSaysWhetherTheGuestHasKVMClockOn(t *testing.T) {
	v := newVM(t)
	const systemTime, on = 0x4b564d01, 0xfffff001 // in the page that it has
	for _, c := range []struct {
		write uint64
		want  error
	}{{0, unix.EINVAL}, {on, nil}, {0, unix.EINVAL}} {
		msrs := struct {
			n, _, index, _ uint32
			data           uint64
		}{n: 1, index: systemTime, data: c.write}
		n, err := ioctl(v.vcpu, kvmSetMSRs, unsafe.Pointer(&msrs))
		if must(t, "KVM_SET_MSRS", n, err) != 1 {
			t.Fatal("KVM_SET_MSRS wrote nothing")
		}
		if _, err := ioctl(v.vcpu, kvmClockCtrl, nil); err != c.want {
			t.Errorf("MSR %#x: KVM_KVMCLOCK_CTRL gives %v, want %v", c.write, err, c.want)
		}
	}
}
