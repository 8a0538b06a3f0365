package guest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

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
	Pad             uint32
}

// Reading is one consistent copy of what the guest wrote. The statistics
// cover every reading of the guest before this one, since its boot.
type Reading struct {
	Sequence        uint32
	Clock           int64 // kvmclock in ns
	TSC             uint64
	Largest         int64 // the largest clock ever seen, ns
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
	page, err := mapMemory(qemuPID, recordAddress, os.Getpagesize())
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
	return mapMemory(qemuPID, 0, 0)
}

// mapMemory maps length bytes at offset of the guest's memory; length 0 means
// all of it.
func mapMemory(qemuPID int, offset int64, length int) ([]byte, error) {
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
		f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", qemuPID, start, end))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if length == 0 {
			length = int(end - start)
		}
		mem, err := unix.Mmap(int(f.Fd()), offset, length, unix.PROT_READ, unix.MAP_SHARED)
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

// HasMagic tells whether memory looks like the record of a guest that runs.
func HasMagic(memory []byte) bool {
	return len(memory) >= RecordSize && binary.LittleEndian.Uint32(memory) == recordMagic
}

// Sample waits for the guest's next reading of its clock and returns it with
// the CLOCK_MONOTONIC_RAW of the moment at which it was seen, both in ns.
// raw - clock is the guest's offset, plus the time from the guest's rdtsc to
// the host's look: always too large, never too small.
func (c *Clock) Sample() (clock, raw int64, err error) {
	if _, err := c.Read(); errors.Is(err, ErrNotRunning) {
		return 0, 0, err
	}
	first := atomic.LoadUint32(&c.rec.Sequence)
	for deadline := Raw() + int64(30*time.Second); ; {
		for range 1000 {
			seq := atomic.LoadUint32(&c.rec.Sequence)
			if seq == first || seq&1 != 0 {
				continue
			}
			clock = int64(atomic.LoadUint64(&c.rec.Clock))
			if atomic.LoadUint32(&c.rec.Sequence) == seq {
				return clock, Raw(), nil
			}
			first = seq
		}
		if Raw() > deadline {
			return 0, 0, errors.New("guest's clock does not move")
		}
	}
}

// Offset samples for that long and returns the smallest
// CLOCK_MONOTONIC_RAW - clock in ns, and how many samples it is the smallest
// of. On a busy machine it takes longer, for enough of them. A guest that falls behind has a growing offset; the difference of two
// offsets is how much it lost in between.
func (c *Clock) Offset(d time.Duration) (offset int64, samples int, err error) {
	offset = math.MaxInt64
	const enough, patience = 1000, 20
	for start := Raw(); ; samples++ {
		if spent := Raw() - start; spent > int64(d) && samples >= enough || spent > patience*int64(d) && samples > 0 {
			return offset, samples, nil
		}
		clock, raw, err := c.Sample()
		if err != nil {
			return 0, samples, err
		}
		offset = min(offset, raw-clock)
	}
}

// Backsteps returns how often the guest saw its clock go back, and the
// largest such step in ns.
func (c *Clock) Backsteps() (count uint64, largest int64, err error) {
	r, err := c.Read()
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
		if _, _, err := c.Sample(); err != nil {
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
