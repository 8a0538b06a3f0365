package guest

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	requestAddress = 0x201000

	out8        = 1
	out16       = 2
	in8         = 3
	tripleFault = 4
)

// request mirrors struct request of guest.c.
type request struct {
	What  uint32
	Port  uint32
	Value uint32
	Times uint32
	Done  uint32
	Busy  uint32
}

// Hands let a test act inside the guest. The guest has no drivers: what it is
// to do with a device, the test tells it port by port.
type Hands struct {
	page []byte
	req  *request
}

// OpenHands maps the page in which the guest in the QEMU process with that pid
// looks for requests. The guest must have booted, see WaitMoving.
func OpenHands(qemuPID int) (*Hands, error) {
	page, err := mapMemory(qemuPID, requestAddress, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return nil, fmt.Errorf("opening hands of guest in process %d: %w", qemuPID, err)
	}
	return &Hands{page: page, req: (*request)(unsafe.Pointer(&page[0]))}, nil
}

// Close unmaps the page.
func (h *Hands) Close() error {
	h.req = nil
	return os.NewSyscallError("munmap", unix.Munmap(h.page))
}

// ask hands the guest a request without waiting for it.
func (h *Hands) ask(what uint32, port uint16, value, times uint32) {
	atomic.StoreUint32(&h.req.Port, uint32(port))
	atomic.StoreUint32(&h.req.Value, value)
	atomic.StoreUint32(&h.req.Times, times)
	atomic.StoreUint32(&h.req.What, what)
}

// do hands the guest a request and waits until it is done. A guest that is
// paused does it when it runs again.
func (h *Hands) do(what uint32, port uint16, value uint32) (uint32, error) {
	before := atomic.LoadUint32(&h.req.Done)
	h.ask(what, port, value, 1)
	for deadline := time.Now().Add(3 * time.Minute); atomic.LoadUint32(&h.req.Done) == before; time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			return 0, errors.New("guest doesn't do what it is asked to")
		}
	}
	return atomic.LoadUint32(&h.req.Value), nil
}

// Out8 writes a byte to a port and waits until it is done.
func (h *Hands) Out8(port uint16, value uint8) error {
	_, err := h.do(out8, port, uint32(value))
	return err
}

// In8 reads a byte from a port.
func (h *Hands) In8(port uint16) (uint8, error) {
	value, err := h.do(in8, port, 0)
	return uint8(value), err
}

// LastOut8 writes a byte to a port, after which the guest may run no further.
func (h *Hands) LastOut8(port uint16, value uint8) { h.ask(out8, port, uint32(value), 1) }

// LastOut16 writes a word to a port, so many times, after which the guest may
// run no further.
func (h *Hands) LastOut16(port uint16, value uint16, times int) {
	h.ask(out16, port, uint32(value), uint32(times))
}

// NeverRest has the guest read its clock all the time, until it is reset.
func (h *Hands) NeverRest() { atomic.StoreUint32(&h.req.Busy, 1) }

// TripleFault has the guest reset itself.
func (h *Hands) TripleFault() { h.ask(tripleFault, 0, 0, 0) }
