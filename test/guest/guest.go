package guest

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"ftclock/kvmclock"

	"golang.org/x/sys/unix"
)

const (
	recordAddress = 0x200000
	recordMagic   = 0x31435446 // "FTC1"

	// RecordSize is the size of a record in bytes.
	RecordSize = int(unsafe.Sizeof(record{}))

	// FlagTSCStable is PVCLOCK_TSC_STABLE_BIT of the kernel's pvclock-abi.h.
	FlagTSCStable = 1
)

// ErrNotRunning says that the guest hasn't written its record yet: the
// firmware still runs, or something else was booted.
var ErrNotRunning = errors.New("guest has not written its record")

// ErrTorn says that no consistent reading was to be had: the guest is stopped
// within an update, or QEMU is gone.
var ErrTorn = errors.New("guest's record is torn")

// record mirrors struct record of record.h.
type record struct {
	Magic           uint32
	Sequence        uint32
	Clock           uint64
	TSC             uint64
	Largest         uint64
	Backsteps       uint64
	LargestBackstep uint64
	LargestGap      uint64
	LargestGapAt    uint64
	Loops           uint64
	PvclockFlags    uint32
	PvclockVersion  uint32
	PvclockUpdates  uint32
	Published       uint32
}

// Reading is one consistent copy of what the guest wrote. The statistics
// cover every reading of the guest before this one, since its boot.
type Reading struct {
	Sequence        uint32
	Clock           int64  // kvmclock in ns
	TSC             uint64 // of the same instant, or a little later
	Largest         int64  // the largest clock ever seen, ns
	Backsteps       uint64
	LargestBackstep int64  // ns
	LargestGap      int64  // the largest forward step between two readings, ns
	LargestGapAt    int64  // the clock behind that step, ns
	Loops           uint64 // readings made
	PvclockFlags    uint32
	PvclockVersion  uint32
	PvclockUpdates  uint32 // how often the host rewrote the pvclock page, as far as the guest saw
}

// Clock is the clock of one running guest, read from outside.
type Clock struct {
	rec   *record
	close func() error
}

// Open finds the guest's memory in the QEMU process with that pid and maps
// the guest's record. The memory must be shared (memory-backend-memfd or
// -file, share=on). Opening works as soon as QEMU runs; whether the guest
// does is told by WaitMoving.
func Open(qemuPID int) (*Clock, error) {
	page, err := mapMemory(qemuPID, recordAddress, os.Getpagesize(), unix.PROT_READ)
	if err != nil {
		return nil, fmt.Errorf("opening clock of guest in process %d: %w", qemuPID, err)
	}
	return &Clock{rec: (*record)(unsafe.Pointer(&page[0])), close: func() error { return unix.Munmap(page) }}, nil
}

// View is the clock whose record begins with memory, which the caller keeps
// mapped. It must be aligned to 8 bytes and hold RecordSize bytes.
func View(memory []byte) *Clock {
	return &Clock{rec: (*record)(unsafe.Pointer(&memory[:RecordSize][0]))}
}

// MapMemory maps the whole memory of the guest in the QEMU process with that
// pid, read-only. The caller unmaps it.
func MapMemory(qemuPID int) ([]byte, error) {
	return mapMemory(qemuPID, 0, 0, unix.PROT_READ)
}

// mapMemory maps length bytes at offset of the guest's memory, with that
// protection of mmap(2); length 0 means all of it.
func mapMemory(qemuPID int, offset int64, length, protection int) ([]byte, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", qemuPID))
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		// start-end perms offset dev inode path, see proc_pid_maps(5).
		var start, end, off uint64
		var perms, dev string
		var inode uint64
		line := lines.Text()
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %s %d", &start, &end, &perms, &off, &dev, &inode); err != nil {
			continue
		}
		if !strings.HasPrefix(perms, "rw") || !strings.HasSuffix(perms, "s") || off != 0 ||
			end-start < recordAddress+uint64(os.Getpagesize()) || end-start > math.MaxInt {
			continue
		}
		access := os.O_RDONLY
		if protection&unix.PROT_WRITE != 0 {
			access = os.O_RDWR
		}
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/map_files/%x-%x", qemuPID, start, end), access, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if length == 0 {
			length = int(end - start)
		}
		mem, err := unix.Mmap(int(f.Fd()), offset, length, protection, unix.MAP_SHARED)
		return mem, os.NewSyscallError("mmap", err)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("no shared guest memory in its maps: memory-backend-memfd with share=on is needed")
}

// Close unmaps the record.
func (c *Clock) Close() error {
	c.rec = nil
	if c.close == nil {
		return nil
	}
	return os.NewSyscallError("munmap", c.close())
}

// Raw reads CLOCK_MONOTONIC_RAW in ns. It is a system call of a few hundred ns here,
// which the minimum filters below make a constant.
func Raw() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
		panic(err) // cannot fail on Linux 2.6.28 and later
	}
	return ts.Nano()
}

// Read returns a consistent copy of the record, of whatever age: a guest that
// is paused keeps its last.
func (c *Clock) Read() (Reading, error) {
	// A running guest publishes every few microseconds, or every few hundred
	// under emulation; one paused in the middle of an update never does.
	for deadline := Raw() + int64(100*time.Millisecond); ; {
		seq := atomic.LoadUint32(&c.rec.Sequence)
		if seq&1 == 0 && seq != 0 {
			if atomic.LoadUint32(&c.rec.Magic) != recordMagic {
				return Reading{}, ErrNotRunning
			}
			r := Reading{
				Sequence:        seq,
				Clock:           int64(atomic.LoadUint64(&c.rec.Clock)),
				TSC:             atomic.LoadUint64(&c.rec.TSC),
				Largest:         int64(atomic.LoadUint64(&c.rec.Largest)),
				Backsteps:       atomic.LoadUint64(&c.rec.Backsteps),
				LargestBackstep: int64(atomic.LoadUint64(&c.rec.LargestBackstep)),
				LargestGap:      int64(atomic.LoadUint64(&c.rec.LargestGap)),
				LargestGapAt:    int64(atomic.LoadUint64(&c.rec.LargestGapAt)),
				Loops:           atomic.LoadUint64(&c.rec.Loops),
				PvclockFlags:    atomic.LoadUint32(&c.rec.PvclockFlags),
				PvclockVersion:  atomic.LoadUint32(&c.rec.PvclockVersion),
				PvclockUpdates:  atomic.LoadUint32(&c.rec.PvclockUpdates),
			}
			if atomic.LoadUint32(&c.rec.Sequence) == seq {
				return r, nil
			}
		}
		if Raw() > deadline {
			if atomic.LoadUint32(&c.rec.Magic) != recordMagic {
				return Reading{}, ErrNotRunning
			}
			return Reading{}, ErrTorn
		}
	}
}

// Sample is one of the guest's readings of its clock, and when the host saw it.
type Sample struct {
	Clock int64  // ns
	Raw   int64  // CLOCK_MONOTONIC_RAW when the host saw it, ns
	TSC   uint64 // the guest's at its reading
	Late  uint32 // how much later the guest published its reading, in ticks of the TSC, modulo 2^32
	Blind int64  // the host saw it that much after a look that didn't yet, or less, ns
}

// Sample waits for the guest's next reading of its clock. Raw - Clock is the guest's offset, plus Late, plus the time from there to the
// host's look.
func (c *Clock) Sample() (s Sample, err error) {
	if _, err := c.Read(); errors.Is(err, ErrNotRunning) {
		return s, err
	}
	first := atomic.LoadUint32(&c.rec.Sequence)
	last := time.Now()
	for deadline := Raw() + int64(3*time.Minute); ; {
		for range 1000 {
			now := time.Now()
			seq := atomic.LoadUint32(&c.rec.Sequence)
			if seq == first || seq&1 != 0 {
				last = now
				continue
			}
			s.Clock = int64(atomic.LoadUint64(&c.rec.Clock))
			s.TSC = atomic.LoadUint64(&c.rec.TSC)
			s.Late = atomic.LoadUint32(&c.rec.Published) - uint32(s.TSC)
			if atomic.LoadUint32(&c.rec.Sequence) == seq {
				s.Raw = Raw()
				s.Blind = int64(time.Since(last))
				return s, nil
			}
			first, last = seq, now
		}
		if Raw() > deadline {
			return s, errors.New("guest's clock does not move")
		}
	}
}

// SettledOffset is an Offset that another one confirms, for a guest that isn't measured while it is paused. It takes some tenths
// of a second where the machine is idle, up to three minutes where it isn't, and is then the smallest that was to be had, and says
// so on standard error: that one may be too large by the time that the guest's readings take to be seen.
func (c *Clock) SettledOffset() (offset int64, err error) {
	const alike = 2500 // ns
	best, settled := int64(math.MaxInt64), false
	for range 45 {
		o, sure, err := c.Offset(200 * time.Millisecond)
		if err != nil {
			return 0, err
		}
		confirmed := settled && sure && o-best < alike && best-o < alike
		best, settled = min(best, o), settled || sure
		if confirmed {
			return best, nil
		}
	}
	fmt.Fprintln(os.Stderr, "guest's clock: no two readings agree: the machine is too busy to measure it well")
	return best, nil
}

// Offset samples for that long and returns by how much at least the clock is behind CLOCK_MONOTONIC_RAW, in ns, kvmclock's own rate
// taken off: for a guest that nobody touches it stays the same. What the guest took to publish a sample
// is accounted for; it is never too small, but the host's look is late where the machine is busy, or its own host is: then it
// takes longer, until there are enough samples and some of them are alike, and isn't settled if that never was so. A guest that
// falls behind has a growing offset; the difference of two offsets is how much it lost in between.
func (c *Clock) Offset(d time.Duration) (offset int64, settled bool, err error) {
	const enough, patience = 300, 20
	const some, alike = 10, 1000 // samples; ns
	// Who shares a processor with the guest sees a sample only when that was made to stop, some 20 us late. Such samples don't
	// count, and all processors have their turn.
	const blind = 3000 // ns
	turn, done := takeTurns()
	defer done()
	var all []Sample
	next := 0 // how many samples there are at the next evaluation
	for start := Raw(); ; {
		turn(len(all) / 32)
		s, err := c.Sample()
		if err != nil {
			return 0, false, err
		}
		all = append(all, s)
		spent := s.Raw - start
		late := spent > patience*int64(d)
		if spent <= int64(d) || len(all) < max(enough, next) && !late {
			continue
		}
		seen := slices.DeleteFunc(slices.Clone(all), func(s Sample) bool { return s.Blind > blind })
		if len(seen) >= some {
			least := offsets(seen)
			settled = least[some-1]-least[0] < alike
			offset = least[0]
		} else if late {
			offset = offsets(all)[0]
		}
		if settled || late {
			return offset, settled, nil
		}
		next = len(all) + len(all)/4
	}
}

// Ahead is by how much this clock is ahead of another one of the same guest, in ns, told by the TSC that each vCPU read with its clock:
// the vCPUs' TSCs must agree, and not be scaled. Unlike Offset it needs no look in time, so that a vCPU that seldom runs, or
// on a busy machine, is measured as well as any other: a reading that the guest was interrupted in is one of many, of which the
// median counts.
func (c *Clock) Ahead(of *Clock) (int64, error) {
	khz := hostKHz()
	if khz == 0 {
		return 0, errors.New("comparing clocks of a guest: KVM doesn't give the frequency of the host's TSC: Linux 5.18 does")
	}
	var ahead []int64
	for range 101 {
		a, err := c.Steady()
		if err != nil {
			return 0, err
		}
		b, err := of.Steady()
		if err != nil {
			return 0, err
		}
		ahead = append(ahead, apart(a, b, khz))
		time.Sleep(5 * time.Millisecond)
	}
	slices.Sort(ahead)
	return ahead[len(ahead)/2], nil
}

// apart is by how much the clock of one reading is ahead of another's, in ns, with a TSC of so many kHz.
func apart(a, b Reading, khz uint32) int64 {
	return a.Clock - b.Clock - int64(float64(int64(a.TSC-b.TSC))*1e6/float64(khz))
}

// onKVMClock is CLOCK_MONOTONIC_RAW at kvmclock's own rate, see package kvmclock.
func onKVMClock(raw int64) int64 { return raw + int64(float64(raw)*drift()) }

var drift = sync.OnceValue(func() float64 {
	if !kvmclock.OnTSC() {
		return 0
	}
	return kvmclock.Drift(hostKHz())
})

// hostKHz is the frequency that KVM has of the host's TSC; 0 where there is no KVM, or one before Linux 5.18.
func hostKHz() uint32 {
	const createVM, getTSCKHz = 0xae01, 0xaea3 // linux/kvm.h
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(kvm) }()
	vm, err := unix.IoctlRetInt(kvm, createVM)
	for err == unix.EINTR { // a signal, such as the runtime's own to preempt a goroutine, ends it
		vm, err = unix.IoctlRetInt(kvm, createVM)
	}
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(vm) }()
	khz, err := unix.IoctlRetInt(vm, getTSCKHz)
	if err != nil || khz < 0 {
		return 0
	}
	return uint32(khz)
}

// takeTurns has the calling goroutine stay on one processor after the other, as turn counts up, until done.
func takeTurns() (turn func(n int), done func()) {
	runtime.LockOSThread()
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil || allowed.Count() < 2 {
		return func(int) {}, runtime.UnlockOSThread
	}
	var each []int
	for cpu := 0; len(each) < allowed.Count(); cpu++ {
		if allowed.IsSet(cpu) {
			each = append(each, cpu)
		}
	}
	last := -1
	turn = func(n int) {
		if n == last {
			return
		}
		last = n
		var one unix.CPUSet
		one.Set(each[n%len(each)])
		_ = unix.SchedSetaffinity(0, &one) // where it can't, it stays where it is
	}
	return turn, func() {
		_ = unix.SchedSetaffinity(0, &allowed)
		runtime.UnlockOSThread()
	}
}

// offsets are those of the samples, ascending, in ns. A sample that the guest was kept from publishing, as by a pause, counts with all of
// its lateness: that it is too large is better than too small.
func offsets(all []Sample) (ascending []int64) {
	const kept = 1e6 // ns
	tick := ticks(all)
	for _, s := range all {
		offset := onKVMClock(s.Raw) - s.Clock
		if late := float64(s.Late) * tick; late < kept {
			offset -= int64(late)
		}
		ascending = append(ascending, offset)
	}
	slices.Sort(ascending)
	return ascending
}

// ticks is how long a tick of the TSC is in ns: from the sample of the first half that was seen soonest to that of the second. 0 where
// there is nothing to tell it by, or the TSC was set back meanwhile, as by a loaded state.
func ticks(all []Sample) float64 {
	between := func(a, b Sample) float64 {
		return float64(b.Raw-a.Raw) / (float64(b.TSC-a.TSC) + float64(b.Late) - float64(a.Late))
	}
	if len(all) < 2 {
		return 0
	}
	for i := range all[1:] {
		if all[i+1].TSC <= all[i].TSC {
			return 0
		}
	}
	roughly := between(all[0], all[len(all)-1])
	soonest := func(of []Sample) Sample {
		return slices.MinFunc(of, func(a, b Sample) int {
			return cmp.Compare(float64(a.Raw-a.Clock)-float64(a.Late)*roughly, float64(b.Raw-b.Clock)-float64(b.Late)*roughly)
		})
	}
	return between(soonest(all[:len(all)/2]), soonest(all[len(all)/2:]))
}

// Steady is a Read that tries again for up to a minute while the record is torn: a busy machine, or an engine that makes
// checkpoints, may have stopped the guest within an update.
func (c *Clock) Steady() (Reading, error) {
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		r, err := c.Read()
		if !errors.Is(err, ErrTorn) || time.Now().After(end) {
			return r, err
		}
	}
}

// Backsteps returns how often the guest saw its clock go back, and the
// largest such step in ns. It reads as Steady does.
func (c *Clock) Backsteps() (count uint64, largest int64, err error) {
	r, err := c.Steady()
	return r.Backsteps, r.LargestBackstep, err
}

// WaitMoving waits until the guest has booted and its clock moves. Under
// emulation the firmware alone takes seconds.
func (c *Clock) WaitMoving(timeout time.Duration) error {
	var last error
	for end := time.Now().Add(timeout); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		first, err := c.Read()
		if err != nil {
			last = err
			continue
		}
		if _, err := c.Sample(); err != nil {
			last = err
			continue
		}
		if second, err := c.Read(); err == nil && second.Clock > first.Clock && first.Loops > 2 {
			return nil
		}
	}
	if last == nil {
		last = errors.New("clock stands still")
	}
	return fmt.Errorf("waiting %v for the guest's clock to move: %w", timeout, last)
}
