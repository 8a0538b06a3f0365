package reliability

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage is the size of the largest message, in bytes.
const maxMessage = 2 << 20

// A speaker writes numbered messages of random sizes, each a JSON object on a line of its own:
//
//	{"n":7}
//	{"execute":"cont","n":8,"fds":2,"sum":"89abcdef","pad":"…"}
//
// The sum is the CRC-32 of the pad. Descriptors are memory files with the message's number in their names.
type speaker struct {
	conn   *net.UnixConn
	words  []string // beginnings of a message, so that the shim has something to see
	random *rand.Rand
	seed   uint64
	all    hash.Hash
	sent   atomic.Uint64
	bytes  uint64
	fds    uint64
	buf    []byte
}

func newSpeaker(conn *net.UnixConn, seed uint64, words ...string) *speaker {
	return &speaker{conn: conn, words: words, random: rand.New(rand.NewPCG(seed, 1)), seed: seed, all: sha256.New()}
}

// size is spread over all magnitudes, so that small messages are many and every size occurs.
func (s *speaker) size() int {
	return int(math.Exp(s.random.Float64() * s.random.Float64() * math.Log(maxMessage)))
}

func (s *speaker) message(number uint64, size, fds int) []byte {
	b := append(s.buf[:0], '{')
	if word := s.words[s.random.IntN(len(s.words))]; size > 40 && word != "" {
		b = append(b, word+","...)
	}
	b = append(b, `"n":`+strconv.FormatUint(number, 10)...)
	if fds > 0 {
		b = append(b, `,"fds":`+strconv.Itoa(fds)...)
	}
	if pad := size - len(b) - len(`,"sum":"01234567","pad":""}`+"\r\n"); pad > 0 {
		b = append(b, `,"sum":"01234567","pad":"`...)
		start := len(b)
		for range pad {
			b = append(b, ' ')
		}
		for i := start; i < len(b); i += 1 + s.random.IntN(64) {
			b[i] = "{}[]:,' abc0"[s.random.IntN(12)]
		}
		copy(b[start-len(`01234567","pad":"`):], fmt.Sprintf("%08x", crc32.ChecksumIEEE(b[start:])))
		b = append(b, '"')
	}
	b = append(b, '}', '\r', '\n')
	s.buf = b
	return b
}

// say sends the next message.
func (s *speaker) say() error {
	count := 0
	if s.random.IntN(12) == 0 {
		count = []int{1, 1, 1, 2, 3, 7, 64, 253}[s.random.IntN(8)]
	}
	return s.sayWith(s.size(), count)
}

func (s *speaker) sayWith(size, count int) error {
	number := s.sent.Load() + 1
	b := s.message(number, size, count)
	s.all.Write(b)
	s.bytes += uint64(len(b))
	s.fds += uint64(count)
	var fds []int
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for i := range count {
		fd, err := unix.MemfdCreate(fmt.Sprintf("n%d.%d", number, i), unix.MFD_CLOEXEC)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	// The descriptors go with the message's first byte, as libvirt sends them, and the rest of it in pieces.
	pieces := 1
	if s.random.IntN(4) == 0 {
		pieces = 1 + s.random.IntN(6)
	}
	for i := range pieces {
		piece := b
		if i < pieces-1 {
			piece = b[:min(len(b), 1+s.random.IntN(max(1, len(b)/2)))]
		}
		if i < pieces-1 && len(piece) == len(b) {
			piece = b[:len(b)-1]
		}
		b = b[len(piece):]
		if i == 0 && count > 0 {
			n, _, err := s.conn.WriteMsgUnix(piece, unix.UnixRights(fds...), nil)
			if err != nil {
				return err
			}
			piece = piece[n:]
		}
		if _, err := s.conn.Write(piece); err != nil {
			return err
		}
	}
	s.sent.Store(number)
	return nil
}

// A listener reads what a speaker said and checks every message. Its errors say where the stream went wrong.
type listener struct {
	conn  *net.UnixConn
	heard atomic.Uint64
	all   hash.Hash
	bytes uint64
	fds   uint64

	line []byte
	got  int // descriptors that came with the message in line
}

func newListener(conn *net.UnixConn) *listener { return &listener{conn: conn, all: sha256.New()} }

// listen reads until the connection ends; that is io.EOF.
func (l *listener) listen() error {
	buf, oob := make([]byte, 256<<10), make([]byte, unix.CmsgSpace(253*4))
	for {
		if rand.IntN(200) == 0 { // now and then the other side has to wait, in whatever it does
			time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Millisecond))))
		}
		n, oobn, flags, _, err := l.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return err
		}
		fds, err := parse(oob[:oobn])
		switch {
		case err == nil && flags&unix.MSG_CTRUNC != 0:
			err = errors.New("descriptors were lost on the way (MSG_CTRUNC)")
		case err == nil && n == 0:
			err = io.EOF
		case err == nil:
			err = l.hear(buf[:n], fds)
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if err != nil {
			return err
		}
	}
}

func parse(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		more, perr := unix.ParseUnixRights(&messages[i])
		fds, err = append(fds, more...), errors.Join(err, perr)
	}
	return fds, err
}

// hear takes what one read gave. A read ends with the bytes that descriptors were sent with, so they belong to the
// message of its last byte.
func (l *listener) hear(b []byte, fds []int) error {
	l.all.Write(b)
	l.bytes += uint64(len(b))
	for len(b) > 0 {
		end := bytes.IndexByte(b, '\n') + 1
		last := end == len(b) || end == 0
		if end == 0 {
			end = len(b)
		}
		l.line, b = append(l.line, b[:end]...), b[end:]
		if last && len(fds) > 0 {
			for _, fd := range fds {
				name, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
				if want := fmt.Sprintf("/memfd:n%d.%d (deleted)", l.heard.Load()+1, l.got); name != want {
					return fmt.Errorf("behind message %d and %.60q… came the descriptor %s, not %s", l.heard.Load(), l.line, name, want)
				}
				l.got++
				l.fds++
			}
		}
		if l.line[len(l.line)-1] == '\n' {
			if err := l.check(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *listener) check() error {
	number := l.heard.Load() + 1
	fail := func(what string) error {
		return fmt.Errorf("message %d, of %d bytes: %s: %.120q", number, len(l.line), what, l.line)
	}
	head, pad, padded := strings.Cut(string(l.line), `,"sum":"`)
	if !padded {
		head, _ = strings.CutSuffix(head, "}\r\n")
	}
	head, count, _ := strings.Cut(head, `,"fds":`)
	_, found, _ := strings.Cut(head, `"n":`)
	if count == "" {
		count = "0"
	}
	switch {
	case found != strconv.FormatUint(number, 10):
		return fail("not the next one")
	case count != strconv.Itoa(l.got):
		return fail(strconv.Itoa(l.got) + " descriptors came with it")
	case padded:
		sum, pad, ok := strings.Cut(pad, `","pad":"`)
		pad, whole := strings.CutSuffix(pad, "\"}\r\n")
		if !ok || !whole || fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(pad))) != sum {
			return fail("damaged")
		}
	}
	l.line, l.got = l.line[:0], 0
	if cap(l.line) > 4*maxMessage {
		l.line = nil
	}
	l.heard.Store(number)
	return nil
}
