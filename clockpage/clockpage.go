package clockpage

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of readers. The first two may pass; a stale record is gone.
var (
	ErrNotYet = errors.New("clock page is not ready yet")
	ErrTorn   = errors.New("clock page kept changing while it was read")
	ErrStale  = errors.New("record is no longer in the ring")
)

// maxTries bounds a reader's retries: a writer holds a section for well under a microsecond, so that a reader which
// meets it this often reads a page that is being played with.
const maxTries = 1000

// A Page is a mapped clock page. Its methods may be called from several goroutines, but SetPolicy and SetOrder from
// one at a time: they are the page's only writers on this side.
type Page struct {
	mem []byte
}

// Map maps the clock page behind f, which stays the caller's. It refuses a file that could be made smaller while it
// is mapped (an access behind its end would kill this process) and a page of another major version.
func Map(f *os.File) (*Page, error) {
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("reading the clock page's seals: %w", os.NewSyscallError("fcntl", err))
	}
	if seals&unix.F_SEAL_SHRINK == 0 {
		return nil, errors.New("clock page is not sealed against shrinking: not the module's")
	}
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading the clock page's size: %w", err)
	}
	if info.Size() < Size {
		return nil, fmt.Errorf("clock page has %d bytes, want %d", info.Size(), Size)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the clock page: %w", os.NewSyscallError("mmap", err))
	}
	p := &Page{mem: mem}
	if _, err := p.Head(); err != nil {
		_ = p.Close()
		return nil, err
	}
	return p, nil
}

// Close unmaps the page. No other method may be running or be called afterwards.
func (p *Page) Close() error {
	mem := p.mem
	p.mem = nil
	return os.NewSyscallError("munmap", unix.Munmap(mem))
}

// Head reads the page's head and checks it.
func (p *Page) Head() (Head, error) {
	var h Head
	if atomic.LoadUint64((*uint64)(p.at(offHead))) != Magic {
		return h, ErrNotYet
	}
	copyOut(unsafe.Pointer(&h), p.at(offHead), unsafe.Sizeof(h))
	if h.Major != Major {
		return h, fmt.Errorf("clock page has version %d.%d, this program knows %d", h.Major, h.Minor, Major)
	}
	if h.Size != Size || h.RingLen != RingLen || h.RecordSize != RecordSize {
		return h, fmt.Errorf("clock page has the wrong shape: %d bytes, %d records of %d", h.Size, h.RingLen, h.RecordSize)
	}
	return h, nil
}

// SetPolicy writes the standing policy.
func (p *Page) SetPolicy(v Policy) {
	write(p.at(offPolicy), unsafe.Pointer(&v), unsafe.Sizeof(v))
}

// Policy reads the standing policy back; ErrNotYet if there never was one.
func (p *Page) Policy() (Policy, error) {
	var v Policy
	err := read(unsafe.Pointer(&v), p.at(offPolicy), unsafe.Sizeof(v))
	if err == nil && v.seq == 0 {
		err = ErrNotYet
	}
	return v, err
}

// SetOrder writes the order for one pause.
func (p *Page) SetOrder(v Order) {
	write(p.at(offOrder), unsafe.Pointer(&v), unsafe.Sizeof(v))
}

// Order reads the last order back; ErrNotYet if there never was one.
func (p *Page) Order() (Order, error) {
	var v Order
	err := read(unsafe.Pointer(&v), p.at(offOrder), unsafe.Sizeof(v))
	if err == nil && v.seq == 0 {
		err = ErrNotYet
	}
	return v, err
}

// SetImport writes the reading from which a loaded state is caught up; the zero value takes it back. A module of page
// version 1.1 knows only restores of the very value, by CLOCK_REALTIME: it gets nothing else.
func (p *Page) SetImport(v Import) {
	if h, err := p.Head(); err == nil && h.Minor < 2 && (v.Leg != LegReal || v.Any != 0 || v.Event == Migrate) {
		v = Import{}
	}
	write(p.at(offImport), unsafe.Pointer(&v), unsafe.Sizeof(v))
}

// Import reads the import back; ErrNotYet if there never was one.
func (p *Page) Import() (Import, error) {
	var v Import
	err := read(unsafe.Pointer(&v), p.at(offImport), unsafe.Sizeof(v))
	if err == nil && v.seq == 0 {
		err = ErrNotYet
	}
	return v, err
}

// SetHost writes how good the host's clock is.
func (p *Page) SetHost(v Host) {
	write(p.at(offHost), unsafe.Pointer(&v), unsafe.Sizeof(v))
}

// Host reads it back; ErrNotYet if it was never written.
func (p *Page) Host() (Host, error) {
	var v Host
	err := read(unsafe.Pointer(&v), p.at(offHost), unsafe.Sizeof(v))
	if err == nil && v.seq == 0 {
		err = ErrNotYet
	}
	return v, err
}

// Follow reads the guest's reference; its Known says whether there is one.
func (p *Page) Follow() (Follow, error) {
	var v Follow
	err := read(unsafe.Pointer(&v), p.at(offFollow), unsafe.Sizeof(v))
	return v, err
}

// Clocks reads which clocks the guest has switched on; ErrNotYet if the module hasn't looked, or is an older one.
func (p *Page) Clocks() (Clocks, error) {
	var v Clocks
	err := read(unsafe.Pointer(&v), p.at(offClocks), unsafe.Sizeof(v))
	if err == nil && v.seq == 0 {
		err = ErrNotYet
	}
	return v, err
}

// Counts reads the module's counters. Each is right; they need not be of one instant.
func (p *Page) Counts() Counts {
	var v Counts
	copyOut(unsafe.Pointer(&v), p.at(offCounts), unsafe.Sizeof(v))
	return v
}

// Now reads the pause that is on.
func (p *Page) Now() (Now, error) {
	var v Now
	err := read(unsafe.Pointer(&v), p.at(offNow), unsafe.Sizeof(v))
	return v, err
}

// Anchor reads the anchor; its Valid says whether there is one.
func (p *Page) Anchor() (Anchor, error) {
	var v Anchor
	err := read(unsafe.Pointer(&v), p.at(offAnchor), unsafe.Sizeof(v))
	return v, err
}

// Record reads the record of pause number, counted from 1. It gives ErrNotYet for a pause that hasn't ended, and
// ErrStale for one that the ring has lost.
func (p *Page) Record(number uint64) (Record, error) {
	var v Record
	if number == 0 {
		return v, ErrStale
	}
	off := offRing + uintptr((number-1)%RingLen)*RecordSize
	if err := read(unsafe.Pointer(&v), p.at(off), unsafe.Sizeof(v)); err != nil {
		return v, err
	}
	switch {
	case v.Number < number:
		return v, ErrNotYet
	case v.Number > number:
		return v, ErrStale
	}
	return v, nil
}

// Last reads up to max of the newest records, oldest first. Records that are torn or gone are left out.
func (p *Page) Last(max int) []Record {
	newest := p.Counts().Pauses
	n := min(uint64(max), RingLen, newest)
	records := make([]Record, 0, n)
	torn := 0
	for i := range n {
		r, err := p.Record(newest - n + 1 + i)
		if err == nil {
			records = append(records, r)
		}
		// The module writes one record at a time: a page with more torn ones is being played with.
		if errors.Is(err, ErrTorn) {
			if torn++; torn > 2 {
				break
			}
		}
	}
	return records
}

func (p *Page) at(off uintptr) unsafe.Pointer {
	return unsafe.Pointer(&p.mem[off])
}

// read copies a section whose first word is its sequence.
func read(dst, src unsafe.Pointer, n uintptr) error {
	seq := (*uint32)(src)
	for range maxTries {
		before := atomic.LoadUint32(seq)
		if before&1 == 0 {
			copyOut(dst, src, n)
			if atomic.LoadUint32(seq) == before {
				return nil
			}
		}
		runtime.Gosched()
	}
	return ErrTorn
}

// write replaces a section of which this side is the only writer. The sequence skips 0, which means "never written".
func write(dst, src unsafe.Pointer, n uintptr) {
	seq := (*uint32)(dst)
	odd := atomic.LoadUint32(seq) | 1
	atomic.StoreUint32(seq, odd)
	// The sequence shares its word with the section's second field: that one is stored alone.
	atomic.StoreUint32((*uint32)(unsafe.Add(dst, 4)), *(*uint32)(unsafe.Add(src, 4)))
	for off := uintptr(8); off < n; off += 8 {
		atomic.StoreUint64((*uint64)(unsafe.Add(dst, off)), *(*uint64)(unsafe.Add(src, off)))
	}
	even := odd + 1
	if even == 0 {
		even = 2
	}
	atomic.StoreUint32(seq, even)
}

// copyOut copies n bytes, a multiple of 8, word by word: another process may be writing.
func copyOut(dst, src unsafe.Pointer, n uintptr) {
	for off := uintptr(0); off < n; off += 8 {
		*(*uint64)(unsafe.Add(dst, off)) = atomic.LoadUint64((*uint64)(unsafe.Add(src, off)))
	}
}
