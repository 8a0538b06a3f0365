package linuxguest

import (
	"encoding/binary"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"ftclock/test/guest"

	"golang.org/x/sys/unix"
)

// These mirror init.c.
const (
	pageMagicA   = 0x6b636f6c63746667
	pageMagicB   = 0x31646e696c657867
	recordOffset = 64
)

// Clocks are the clocks of one running Linux guest, read from outside out of
// the memory of its init.
type Clocks struct {
	// CPUs has those that each vCPU reads, in the order of their numbers.
	CPUs []CPU
	// Monotonic and Realtime are vCPU 0's.
	Monotonic, Realtime *guest.Clock

	memory []byte
}

// CPU are the guest's CLOCK_MONOTONIC and CLOCK_REALTIME as one vCPU reads
// them. What concerns pvclock is zero in their readings.
type CPU struct {
	Monotonic, Realtime *guest.Clock

	page *page
}

// page mirrors the beginning of struct page of init.c.
type page struct {
	Magic         [2]uint64
	CPU, CPUs     uint64
	Across        uint64
	LargestAcross int64
}

// Across is how often this vCPU read CLOCK_MONOTONIC below what another one had
// read before, and by how much at most, in ns.
func (c CPU) Across() (count uint64, largest int64) {
	return atomic.LoadUint64(&c.page.Across), atomic.LoadInt64(&c.page.LargestAcross)
}

// Open maps the memory of the guest in the QEMU process with that pid, and
// waits until its init runs and its clocks move on every vCPU.
func Open(qemuPID int, timeout time.Duration) (*Clocks, error) {
	memory, err := guest.MapMemory(qemuPID)
	if err != nil {
		return nil, fmt.Errorf("opening clocks of Linux guest in process %d: %w", qemuPID, err)
	}
	for end := time.Now().Add(timeout); ; time.Sleep(500 * time.Millisecond) {
		if c := find(memory); c != nil {
			return c, nil
		}
		if time.Now().After(end) {
			unix.Munmap(memory)
			return nil, fmt.Errorf("opening clocks of Linux guest in process %d: %w after %v", qemuPID, errNotFound, timeout)
		}
	}
}

// find looks for the pages of init's threads. A page that an earlier boot of
// the same guest left behind has the magic too, but doesn't move.
func find(memory []byte) *Clocks {
	c := &Clocks{memory: memory}
	found := map[uint64]CPU{}
	var cpus uint64
	for at := 0; at+4096 <= len(memory); at += 4096 {
		p := memory[at : at+4096]
		if binary.LittleEndian.Uint64(p) != pageMagicA || binary.LittleEndian.Uint64(p[8:]) != pageMagicB {
			continue
		}
		cpu := CPU{
			Monotonic: guest.View(p[recordOffset:]),
			Realtime:  guest.View(p[recordOffset+guest.RecordSize:]),
			page:      (*page)(unsafe.Pointer(&p[0])),
		}
		if cpu.Monotonic.WaitMoving(time.Second) == nil && cpu.Realtime.WaitMoving(time.Second) == nil {
			found[cpu.page.CPU], cpus = cpu, cpu.page.CPUs
		}
	}
	for n := range cpus {
		cpu, ok := found[n]
		if !ok {
			return nil
		}
		c.CPUs = append(c.CPUs, cpu)
	}
	if len(c.CPUs) == 0 {
		return nil
	}
	c.Monotonic, c.Realtime = c.CPUs[0].Monotonic, c.CPUs[0].Realtime
	return c
}

// Close unmaps the guest's memory.
func (c *Clocks) Close() error {
	c.CPUs, c.Monotonic, c.Realtime = nil, nil, nil
	return os.NewSyscallError("munmap", unix.Munmap(c.memory))
}

// Line is one line of the clocks that init prints about once a second.
type Line struct {
	Realtime, Monotonic int64 // ns
	TSC                 uint64
	Source              string // the kernel's clock source
}

// Log is what a guest has printed so far.
type Log struct {
	Lines []Line
	// Kernel has the kernel's messages.
	Kernel []string
	// Complaints are those of them that speak of a clock, a CPU or a task in trouble.
	Complaints []string
}

var (
	clockLine  = regexp.MustCompile(`^ftclock clock realtime=(\d+) monotonic=(\d+) tsc=(\d+) source=(\S+)`)
	complaints = regexp.MustCompile(`(?i)\bstall|lockup|unstable|\bhung\b|time went backwards|skew|\bBUG: `)
	// preempted are what the kernel's watchdog of clock sources says where the guest's CPU was taken away between two readings
	// (kernel/time/clocksource.c). A skew that it finds has a line of its own.
	preempted = regexp.MustCompile(`clock-skew test skipped!|excessive read-back delay of|Marking TSC unstable due to clocksource watchdog`)
)

// ReadLog reads the console of a guest, see Console, as far as its last whole line.
func ReadLog(path string) (*Log, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading console of Linux guest: %w", err)
	}
	return parseLog(string(text)), nil
}

func parseLog(text string) *Log {
	log := &Log{}
	for line := range strings.Lines(text) {
		line, whole := strings.CutSuffix(line, "\n")
		if !whole { // the guest is writing it
			break
		}
		line = strings.TrimRight(line, "\r")
		if m := clockLine.FindStringSubmatch(line); m != nil {
			l := Line{Source: m[4]}
			var err [3]error
			l.Realtime, err[0] = strconv.ParseInt(m[1], 10, 64)
			l.Monotonic, err[1] = strconv.ParseInt(m[2], 10, 64)
			l.TSC, err[2] = strconv.ParseUint(m[3], 10, 64)
			if err == [3]error{} {
				log.Lines = append(log.Lines, l)
			}
			continue
		}
		message, forwarded := strings.CutPrefix(line, "ftclock kernel ")
		if !forwarded && strings.HasPrefix(line, "ftclock ") {
			continue
		}
		// What isn't forwarded the kernel printed itself: errors, in spite of "quiet".
		if message != "" {
			log.Kernel = append(log.Kernel, message)
		}
		if complaints.MatchString(message) && !preempted.MatchString(message) {
			log.Complaints = append(log.Complaints, message)
		}
	}
	return log
}
