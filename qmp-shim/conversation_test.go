package shim

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
	"time"

	"golang.org/x/sys/unix"
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

// carry sends text in pieces that end at cuts, with fds descriptors at the first byte, and reads it on the other side.
func (c *courier) carry(fromQEMU bool, text []byte, fds int, cuts ...int) {
	c.t.Helper()
	from, to := c.client, c.qemu
	if fromQEMU {
		from, to = to, from
	}
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() {
		last := 0
		for _, cut := range append(cuts, len(text)) {
			piece := text[last:cut]
			last = cut
			if len(piece) == 0 {
				continue
			}
			if cut == len(piece) && fds > 0 {
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
	got, came := 0, 0
	for got < len(text) {
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
		if len(arrived) > 0 && got > 0 {
			c.t.Errorf("cut at %v: descriptors came with byte %d", cuts, got)
		}
		came += len(arrived)
		got += n
	}
	if came != fds {
		c.t.Fatalf("cut at %v: %d descriptors of %d", cuts, came, fds)
	}
}

func newCourier(t *testing.T, o observer) *courier {
	t.Helper()
	client, qemu, wait := between(t, o)
	c := &courier{t: t, client: client, qemu: qemu, buf: make([]byte, 64<<10), oob: make([]byte, unix.CmsgSpace(maxFDs*4)), file: tag(t, "carried")}
	t.Cleanup(func() {
		client.Close()
		qemu.Close()
		c.file.Close()
		if err := wait(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestConversationsCutAnywhere carries recorded conversations in two pieces a part, cut at every byte of the small
// parts, and at random ones and around the relay's chunks in the large ones.
func TestConversationsCutAnywhere(t *testing.T) {
	for _, name := range recordings {
		t.Run(name, func(t *testing.T) {
			parts := recorded(t, name)
			o := &seen{}
			c := newCourier(t, o)
			random := rand.New(rand.NewPCG(1, 2))
			for i, p := range parts {
				var cuts []int
				if len(p.text) <= 2048 {
					for cut := range len(p.text) {
						cuts = append(cuts, cut)
					}
				} else {
					for at := chunkSize; at < len(p.text); at += chunkSize {
						for cut := at - 16; cut <= min(at+16, len(p.text)-1); cut++ {
							cuts = append(cuts, cut)
						}
					}
					for range 100 {
						cuts = append(cuts, random.IntN(len(p.text)))
					}
				}
				for _, cut := range cuts {
					c.carry(p.fromQEMU, p.text, p.fds, cut)
				}
				if i%8 == 0 { // with as many descriptors as there can be
					c.carry(p.fromQEMU, p.text, maxFDs, len(p.text)/2)
				}
			}
			// The relay closes its copies after they have gone on.
			carried := func() int { return strings.Count(strings.Join(openFDs(), "\n"), "memfd:carried") }
			for end := time.Now().Add(20 * time.Second); carried() > 1; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d copies of the descriptor are left", carried())
				}
			}
		})
	}
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
					c.carry(p.fromQEMU, p.text, p.fds, cuts...)
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
		client, qemu, wait := between(t, o)
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
		client.Close()
		qemu.Close()
		_ = wait()
	}
}
