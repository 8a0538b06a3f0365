package shim

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/host"
)

// The relay's state is what a worker leaves to the next one: a memory file of stateSize bytes that whoever
// keeps the shim holds, too. Its first words change with every message and are written one by one. The rest is two slots for a text, of
// which the one with the higher number and a right checksum counts; so a worker that dies while it writes leaves the
// older one.
//
// Version 1: the first. A worker that finds a higher major version begins with an empty state: it loses what status
// has to tell, and no byte.
const (
	stateMagic   = 0x59414c4552544600 // "\0FTRELAY"
	stateVersion = 1
	stateSize    = 64 << 10

	offMagic   = 0
	offVersion = 8
	offMid     = 16 // two words, one a direction: client to QEMU, QEMU to client
	offCarry   = 24 // two words
	offSlots   = 64
	slotSize   = (stateSize - offSlots) / 2
	slotHead   = 16 // number (8 bytes), length (4), CRC-32 (4)
)

// errState is the error of a state that can't be used.
var errState = errors.New("the state that the last worker left can't be used")

// errEmpty is the error of a state that was never saved.
var errEmpty = fmt.Errorf("%w: it is empty", errState)

// memory is the part of the state that is text.
type memory struct {
	Since    time.Time `json:"since"`
	Began    bool      `json:"began,omitempty"` // a worker was ready
	Clock    string    `json:"clock"`           // the policy as XML; "" watches only
	Metadata string    `json:"metadata"`        // the policy that the domain's metadata had when it was last looked at
	Gate     bool      `json:"gate"`            // no cont has gone through yet
	Why      string    `json:"why,omitempty"`   // the module wasn't loaded, and isn't to be tried again
	Method   string    `json:"method,omitempty"`
	QEMU     int       `json:"qemu,omitempty"`  // pid
	Monitor  uint64    `json:"monitor"`         // the inode of monitor.sock
	Workers  uint64    `json:"workers"`         // how many there were, this one included
	Loads    bool      `json:"loads,omitempty"` // a snapshot was loaded before the first cont
	Problems problems  `json:"problems"`
}

type problems struct {
	Disagreements    uint64   `json:"disagreements,omitempty"`
	LastDisagreement string   `json:"last,omitempty"`
	Warnings         []string `json:"warnings,omitempty"`
}

type stateFile struct {
	mem    []byte
	number uint64 // of the newest slot
}

// newState makes an empty state, in a memory file that is the caller's.
func newState() (fd int, err error) {
	fd, err = host.SizedFile("ftclock-relay", stateSize)
	if err != nil {
		return -1, fmt.Errorf("making the relay's state: %w", err)
	}
	return fd, nil
}

// openState maps a state. fd stays the caller's.
func openState(fd int) (*stateFile, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil || stat.Size != stateSize {
		return nil, fmt.Errorf("%w: it has %d bytes", errState, stat.Size)
	}
	mem, err := unix.Mmap(fd, 0, stateSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the relay's state: %w", os.NewSyscallError("mmap", err))
	}
	return &stateFile{mem: mem}, nil
}

// load reads the text. A state that was never saved gives errState, too.
func (s *stateFile) load() (memory, error) {
	var m memory
	if binary.LittleEndian.Uint64(s.mem[offMagic:]) != stateMagic {
		return m, errEmpty
	}
	if v := binary.LittleEndian.Uint32(s.mem[offVersion:]); v != stateVersion {
		return m, fmt.Errorf("%w: version %d, this program knows %d", errState, v, stateVersion)
	}
	var text []byte
	for i := range 2 {
		slot := s.slot(i)
		number := binary.LittleEndian.Uint64(slot)
		length := binary.LittleEndian.Uint32(slot[8:])
		if number < s.number || number == 0 || length > slotSize-slotHead {
			continue
		}
		body := slot[slotHead : slotHead+length]
		if crc32.ChecksumIEEE(body) == binary.LittleEndian.Uint32(slot[12:]) {
			s.number, text = number, body
		}
	}
	if text == nil {
		return m, fmt.Errorf("%w: both its slots are torn", errState)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return memory{}, fmt.Errorf("%w: %w", errState, err)
	}
	return m, nil
}

// save writes the text into the older slot.
func (s *stateFile) save(m memory) error {
	text, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("saving the relay's state: %w", err)
	}
	if len(text) > slotSize-slotHead {
		return fmt.Errorf("saving the relay's state: %d bytes are too many", len(text))
	}
	s.number++
	slot := s.slot(int(s.number & 1))
	binary.LittleEndian.PutUint64(slot, 0) // while it is written it doesn't count
	binary.LittleEndian.PutUint32(slot[8:], uint32(len(text)))
	binary.LittleEndian.PutUint32(slot[12:], crc32.ChecksumIEEE(text))
	copy(slot[slotHead:], text)
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&slot[0])), s.number)
	binary.LittleEndian.PutUint32(s.mem[offVersion:], stateVersion)
	binary.LittleEndian.PutUint64(s.mem[offMagic:], stateMagic)
	return nil
}

func (s *stateFile) slot(i int) []byte {
	return s.mem[offSlots+i*slotSize:][:slotSize]
}

// mid is the word that says of a direction whether its stream, as far as it was taken from its source, may be within a
// message.
func (s *stateFile) mid(direction int) *uint32 {
	return (*uint32)(unsafe.Pointer(&s.mem[offMid+4*direction]))
}

// carry is the word that says of a direction that the next byte of its source has gone on already, with its
// descriptors.
func (s *stateFile) carry(direction int) *uint32 {
	return (*uint32)(unsafe.Pointer(&s.mem[offCarry+4*direction]))
}

// maxWarnings bounds what is kept for status.
const maxWarnings = 16

// A notebook holds what the next worker has to know, and saves it whenever it changes. Status and log have their warnings from it.
type notebook struct {
	log  zerolog.Logger
	save func(memory)

	mu sync.Mutex
	m  memory
}

// read gives what it says now.
func (n *notebook) read() memory {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.m
}

// change has f change it.
func (n *notebook) change(f func(*memory)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.m)
	n.save(n.m)
}

// disagree counts a pause that the two sides measured differently.
func (n *notebook) disagree(what string) {
	var times uint64
	n.change(func(m *memory) {
		m.Problems.Disagreements++
		m.Problems.LastDisagreement = what
		times = m.Problems.Disagreements
	})
	if worthALine(times) {
		n.log.Error().Uint64("disagreements", times).Msg("the two measurements disagree: " + what +
			"; don't trust this clock, and run `ftclock doctor`")
	}
}

// worthALine picks the first of many events, the tenth, the hundredth and so on: the log has a line an event, never one a
// pause.
func worthALine(n uint64) bool {
	for n >= 10 && n%10 == 0 {
		n /= 10
	}
	return n == 1
}

// warn tells of each thing once. What a warning says must not change with each pause.
func (n *notebook) warn(what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := &n.m.Problems
	if slices.Contains(p.Warnings, what) {
		return
	}
	if len(p.Warnings) == maxWarnings {
		p.Warnings = p.Warnings[1:]
	}
	p.Warnings = append(p.Warnings, what)
	n.save(n.m)
	n.log.Warn().Msg(what)
}
