package relay

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/test/fds"
)

// A part of a conversation is what one side said before the other did.
type part struct {
	fromQEMU bool
	fds      int // that came with the first byte
	text     []byte
}

// recorded reads a conversation with a real QEMU from testdata: for each part a line with "<" (QEMU's) or ">", its
// length and its descriptors, then the bytes and a newline.
func recorded(t *testing.T, name string) (parts []part) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			return parts
		}
		var from string
		var length int
		var p part
		if _, err := fmt.Sscan(line, &from, &length, &p.fds); err != nil {
			t.Fatal(err)
		}
		p.fromQEMU, p.text = from == "<", make([]byte, length+1)
		if _, err := io.ReadFull(r, p.text); err != nil {
			t.Fatal(err)
		}
		p.text = p.text[:length]
		parts = append(parts, p)
	}
}

var recordings = []string{"qemu-7.2.monitor", "qemu-10.0.monitor"}

// A courier sends through a relay and sees that the same comes out.
type courier struct {
	t            *testing.T
	client, qemu *net.UnixConn
	buf, oob     []byte
	file         *os.File
}

// carry sends text in pieces that end at cuts, with fds descriptors at the first byte of the piece numbered with, and reads
// it on the other side. It gives the bytes with which descriptors came.
func (c *courier) carry(fromQEMU bool, text []byte, fds, with int, cuts ...int) (at []int) {
	c.t.Helper()
	from, to := c.client, c.qemu
	if fromQEMU {
		from, to = to, from
	}
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() {
		last := 0
		for i, cut := range append(cuts, len(text)) {
			piece := text[last:cut]
			last = cut
			if len(piece) == 0 {
				continue
			}
			if i == with && fds > 0 {
				all := make([]int, fds)
				for i := range all {
					all[i] = int(c.file.Fd())
				}
				n, _, err := from.WriteMsgUnix(piece, unix.UnixRights(all...), nil)
				if err != nil {
					c.t.Error(err)
					return
				}
				piece = piece[n:]
			}
			if _, err := from.Write(piece); err != nil {
				c.t.Error(err)
				return
			}
		}
	})
	for got := 0; got < len(text); {
		n, oobn, flags, _, err := to.ReadMsgUnix(c.buf[:min(len(c.buf), len(text)-got)], c.oob)
		if err != nil || n == 0 {
			c.t.Fatalf("cut at %v: after %d bytes of %d: %d, %v", cuts, got, len(text), n, err)
		}
		if !bytes.Equal(c.buf[:n], text[got:got+n]) {
			c.t.Fatalf("cut at %v: other bytes come between %d and %d", cuts, got, got+n)
		}
		arrived, err := parseFDs(c.oob[:oobn])
		closeAll(arrived)
		if err != nil || flags&unix.MSG_CTRUNC != 0 {
			c.t.Fatalf("descriptors: %v, flags %x", err, flags)
		}
		got += n
		if len(arrived) > 0 { // a read ends with the message that they were sent with, which is one byte
			if len(arrived) != fds {
				c.t.Fatalf("cut at %v: %d descriptors of %d came with byte %d", cuts, len(arrived), fds, got-1)
			}
			at = append(at, got-1)
		}
	}
	return at
}

// whole carries a line, or more, whose descriptors go with its first byte.
func (c *courier) whole(p part, fds int, cuts ...int) {
	c.t.Helper()
	with := 0
	for with < len(cuts) && cuts[with] == 0 { // an empty piece
		with++
	}
	at := c.carry(p.fromQEMU, p.text, fds, with, cuts...)
	if fds > 0 && fmt.Sprint(at) != "[0]" || fds == 0 && at != nil {
		c.t.Fatalf("cut at %v: the %d descriptors of byte 0 came with %v", cuts, fds, at)
	}
}

func newCourier(t *testing.T, o Observer) *courier {
	t.Helper()
	client, qemu, end := between(t, o)
	c := &courier{t: t, client: client, qemu: qemu, buf: make([]byte, 64<<10), oob: make([]byte, unix.CmsgSpace(maxFDs*4)), file: tag(t, "carried")}
	t.Cleanup(func() {
		client.Close()
		qemu.Close()
		c.file.Close()
		end()
	})
	return c
}

// TestConversationsCutAnywhere carries recorded conversations cut at every byte: the small parts in two pieces, the large
// ones in two around the relay's chunks, and in pieces of 1 KiB that begin at each byte in turn, or each 16th without FTCLOCK_LONG=1.
func TestConversationsCutAnywhere(t *testing.T) {
	const small, pieces = 2048, 1024
	step := 16
	if os.Getenv("FTCLOCK_LONG") == "1" {
		step = 1
	}
	for _, name := range recordings {
		t.Run(name, func(t *testing.T) {
			parts := recorded(t, name)
			c := newCourier(t, &seen{})
			total := 0
			carry := func(p part, cuts ...int) {
				c.whole(p, p.fds, cuts...)
				total += len(cuts)
			}
			for i, p := range parts {
				if len(p.text) <= small {
					for cut := range len(p.text) {
						carry(p, cut)
					}
				} else {
					for at := chunkSize; at < len(p.text); at += chunkSize {
						for cut := at - 16; cut <= min(at+16, len(p.text)-1); cut++ {
							carry(p, cut)
						}
					}
					for first := 0; first < pieces; first += step {
						var cuts []int
						for cut := first; cut < len(p.text); cut += pieces {
							cuts = append(cuts, cut)
						}
						carry(p, cuts...)
					}
				}
				if i%8 == 0 && bytes.Count(p.text, []byte("\n")) == 1 { // with as many descriptors as there can be
					c.whole(p, maxFDs, len(p.text)/2)
				}
			}
			t.Logf("%d parts, %d cuts", len(parts), total)
			c.noneLeft()
		})
	}
}

// TestDescriptorsWithAnyPiece sends descriptors with each line of the conversations, and with either piece of a line that
// is cut at every byte. With a line's first byte they come with that, once. With a later one, as libvirt sends them again
// after a write that was cut short, they come with that byte, and may have come before, with others of the same line.
func TestDescriptorsWithAnyPiece(t *testing.T) {
	for _, name := range recordings {
		t.Run(name, func(t *testing.T) {
			c := newCourier(t, &seen{})
			lines, cuts, again := 0, 0, 0
			for _, p := range recorded(t, name) {
				for begin := 0; begin < len(p.text); {
					end := begin + bytes.IndexByte(p.text[begin:], '\n') + 1
					if end == begin {
						t.Fatalf("a part of %s ends within a line", name)
					}
					lines++
					// Its own write, among the part's others.
					if at := c.carry(p.fromQEMU, p.text, 1, 1, begin, end); fmt.Sprint(at) != fmt.Sprint([]int{begin}) {
						t.Fatalf("the descriptor of the line from %d to %d came with %v", begin, end, at)
					}
					line := part{p.fromQEMU, 0, p.text[begin:end]}
					begin = end
					for cut := 1; cut < len(line.text) && len(line.text) <= 2048; cut++ {
						cuts++
						c.whole(line, 2, cut)
						at := c.carry(p.fromQEMU, line.text, 2, 1, cut)
						if len(at) == 0 || at[len(at)-1] != cut {
							t.Fatalf("the descriptors of byte %d came with %v", cut, at)
						}
						again += len(at) - 1
					}
				}
			}
			t.Logf("%d lines, %d cuts; descriptors of a line's second piece came with its first one, too, %d times", lines, cuts, again)
			c.noneLeft()
		})
	}
}

// noneLeft waits until the relay has closed its copies of the descriptor, which it does after they have gone on.
func (c *courier) noneLeft() {
	c.t.Helper()
	carried := func() int { return strings.Count(strings.Join(fds.Open(), "\n"), "memfd:carried") }
	eventually(c.t, "all copies of the descriptor but one are closed", func() bool { return carried() == 1 })
}

// TestARecordedConversationIsRecognised carries each recording in random pieces and looks at what the observer is told.
func TestARecordedConversationIsRecognised(t *testing.T) {
	for _, name := range recordings {
		t.Run(name, func(t *testing.T) {
			parts := recorded(t, name)
			for seed := range uint64(20) {
				o := &seen{gate: seed%2 == 1}
				c := newCourier(t, o)
				random := rand.New(rand.NewPCG(seed, 3))
				for _, p := range parts {
					var cuts []int
					for cut := 0; cut < len(p.text); cut += 1 + random.IntN(1+len(p.text)/4) {
						cuts = append(cuts, cut)
					}
					c.whole(p, p.fds, cuts...)
				}
				o.mu.Lock()
				log := strings.Join(o.log, "\n") + "\n"
				o.mu.Unlock()
				for what, want := range map[string]int{"command stop\n": 3, "cont \"libvirt-": 3, "qemu STOP\n": 3, "qemu RESUME\n": 3,
					"command getfd\n": 1, "qemu SHUTDOWN\n": 1, "command quit\n": 1} {
					if n := strings.Count(log, what); n != want {
						t.Fatalf("%q was seen %d times, not %d:\n%s", what, n, want, log)
					}
				}
			}
		})
	}
}

// TestDescriptorsBehindOtherMessages queues messages with and without descriptors before the relay looks: what a peek
// shows may lie behind many bytes that have none.
func TestDescriptorsBehindOtherMessages(t *testing.T) {
	for _, ahead := range []int{1, 20, chunkSize - 1, chunkSize, chunkSize + 1, 100 << 10} {
		held := make(chan struct{})
		o := &seen{onCont: func() { <-held }}
		client, qemu, end := between(t, o)
		first := `{"execute":"cont"}` + "\n"
		filler := `"` + strings.Repeat("x", ahead) + `"` + "\n"
		carrier := `{"execute":"getfd"}` + "\n"
		text := first + filler + carrier + carrier + filler + carrier
		var group sync.WaitGroup
		group.Go(func() {
			for i, message := range []string{first, filler, carrier, carrier, filler, carrier} {
				var rights []byte
				if message == carrier {
					f := tag(t, fmt.Sprint("of", i))
					defer f.Close()
					rights = unix.UnixRights(int(f.Fd()))
				}
				if i == 3 {
					close(held) // at the latest: the socket may be full
				}
				n, _, err := client.WriteMsgUnix([]byte(message), rights, nil)
				if err == nil {
					_, err = client.Write([]byte(message)[n:])
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
		var came []string
		got := 0
		buf, oob := make([]byte, 1<<20), make([]byte, unix.CmsgSpace(maxFDs*4))
		for got < len(text) {
			n, oobn, _, _, err := qemu.ReadMsgUnix(buf, oob)
			if err != nil || n == 0 || string(buf[:n]) != text[got:got+n] {
				t.Fatalf("%d ahead, at byte %d: %d, %v", ahead, got, n, err)
			}
			got += n
			fds, _ := parseFDs(oob[:oobn])
			for _, fd := range fds {
				name, _ := os.Readlink(fmt.Sprint("/proc/self/fd/", fd))
				came = append(came, fmt.Sprint(name, " at ", got-1))
			}
			closeAll(fds)
		}
		at := len(first) + len(filler)
		want := fmt.Sprintf("[/memfd:of2 (deleted) at %d /memfd:of3 (deleted) at %d /memfd:of5 (deleted) at %d]",
			at, at+len(carrier), at+2*len(carrier)+len(filler))
		if fmt.Sprint(came) != want {
			t.Errorf("%d ahead: got %v, want %s", ahead, came, want)
		}
		group.Wait()
		end()
	}
}
