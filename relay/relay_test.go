package relay

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/test/fds"
)

func TestMain(m *testing.M) { os.Exit(fds.Run(m)) }

// seen is an observer that writes down what it is told.
type seen struct {
	mu      sync.Mutex
	log     []string
	gate    bool
	refusal string
	onCont  func()
}

func (s *seen) add(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, what)
}

func (s *seen) newest() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log[len(s.log)-1]
}

func (s *seen) Command(m Message)  { s.add("command " + m.Execute) }
func (s *seen) FromQEMU(m Message) { s.add("qemu " + m.Event + m.ID) }
func (s *seen) Unread(so bool)     { s.add(fmt.Sprintf("unread %t", so)) }
func (s *seen) Holds() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gate
}

func (s *seen) Cont(m Message) string {
	s.add("cont " + m.ID)
	if s.onCont != nil {
		s.onCont()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refusal == "" {
		s.gate = false
	}
	return s.refusal
}

// pair gives two connected stream sockets.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// unstarted makes a relay with pipes and words of its own, and gives its two outer ends.
func unstarted(t testing.TB, o Observer) (client, qemu *net.UnixConn, r *Relay) {
	t.Helper()
	client, inner1 := pair(t)
	qemu, inner2 := pair(t)
	var directions [2]Direction
	for i := range directions {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		directions[i] = Direction{R: ends[0], W: ends[1], Mid: new(uint32), Carry: new(uint32)}
		t.Cleanup(func() { closeAll(ends[:]) })
	}
	return client, qemu, New(inner1, inner2, directions, o)
}

// between starts a relay and gives its two outer ends, and a function that ends it.
func between(t testing.TB, o Observer) (client, qemu *net.UnixConn, end func()) {
	t.Helper()
	client, qemu, r := unstarted(t, o)
	return client, qemu, running(t, client, qemu, r)
}

// running runs a relay, and gives a function that closes what of its outer ends is still open, and waits for the relay's end.
func running(t testing.TB, client, qemu *net.UnixConn, r *Relay) (end func()) {
	done := make(chan error, 1)
	go func() { done <- r.Run() }()
	return func() {
		t.Helper()
		client.Close()
		qemu.Close()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the relay ends with: %v", err)
			}
		case <-time.After(2 * time.Minute):
			t.Fatal("the relay doesn't end")
		}
	}
}

func send(t testing.TB, to io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(to, text); err != nil {
		t.Fatal(err)
	}
}

// expect reads as much as is wanted.
func expect(t testing.TB, from *net.UnixConn, want string) {
	t.Helper()
	_ = from.SetReadDeadline(time.Now().Add(2 * time.Minute))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(from, got); err != nil || string(got) != want {
		t.Fatalf("got %.500q (%v), want %.500q", got[:n], err, want)
	}
}

// expectAll reads to the end of what comes.
func expectAll(t testing.TB, from io.Reader, want string) {
	t.Helper()
	if got, err := io.ReadAll(from); err != nil || string(got) != want {
		t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}

// eventually waits until something is so.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("this doesn't come: %s", what)
		}
	}
}

func TestRelayMovesAnythingBothWays(t *testing.T) {
	client, qemu, end := between(t, &seen{})
	noise := make([]byte, 3<<20)
	_, _ = rand.Read(noise)
	long := []byte(`{"return": "` + strings.Repeat("x", 12<<20) + `"}` + "\r\n") // past libvirt's own 10 MiB
	up := bytes.Join([][]byte{noise, []byte("\n" + `{"execute":"cont"}` + "\n"), long, noise}, nil)
	down := bytes.Join([][]byte{long, noise, long}, nil)
	var group sync.WaitGroup
	sendAll := func(c *net.UnixConn, b []byte) {
		if _, err := c.Write(b); err != nil {
			t.Error(err)
		}
	}
	receiveAll := func(c *net.UnixConn, want []byte) {
		got := make([]byte, len(want))
		n, err := io.ReadFull(c, got)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes of %d arrived, or others: %v", n, len(want), err)
		}
	}
	group.Go(func() { sendAll(client, up) })
	group.Go(func() { sendAll(qemu, down) })
	group.Go(func() { receiveAll(qemu, up) })
	group.Go(func() { receiveAll(client, down) })
	group.Wait()
	_ = client.CloseWrite()
	if n, err := qemu.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the client's end doesn't reach QEMU: %d, %v", n, err)
	}
	_ = qemu.CloseWrite()
	if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("QEMU's end doesn't reach the client: %d, %v", n, err)
	}
	end()
}

// What comes before a cont that is held goes on, and nothing of the cont does.
func TestRelayHoldsACont(t *testing.T) {
	release := make(chan struct{})
	o := &seen{gate: true, onCont: func() { <-release }}
	client, qemu, end := between(t, o)
	const first, second = `{"execute":"stop"}`, `{"execute":"cont","id":"c"}` + "\r\n"
	send(t, client, first+second)
	expect(t, qemu, first)
	silent(t, qemu)
	close(release)
	expect(t, qemu, second)
	end()
	if got := fmt.Sprint(o.log); got != `[command stop cont "c"]` {
		t.Fatal(got)
	}
}

// silent checks that nothing arrives for a while.
func silent(t *testing.T, c *net.UnixConn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1024)
	if n, err := c.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%q arrives too soon: %v", got[:n], err)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

// A cont that isn't held arrives whole, and not before the observer has had it.
func TestAContThatIsntHeldGoesOnWhole(t *testing.T) {
	release := make(chan struct{})
	client, qemu, end := between(t, &seen{onCont: func() { <-release }})
	text := `{"execute":"cont","id":"c"}` + "\r\n"
	send(t, client, text)
	silent(t, qemu)
	close(release)
	got := make([]byte, 2*len(text))
	if n, err := qemu.Read(got); err != nil || string(got[:n]) != text {
		t.Fatalf("then %q arrives at once: %v", got[:n], err)
	}
	end()
}

func TestRelayRefusesACont(t *testing.T) {
	o := &seen{gate: true, refusal: `no "module"`}
	client, qemu, end := between(t, o)
	// In two pieces, with a command before and one behind.
	send(t, client, `{"execute":"query-status","id":1}`+"\r\n"+`{"execu`)
	send(t, client, `te":"cont","id":"l-2"}`+"\r\n"+`{"execute":"quit","id":3}`+"\r\n")
	expect(t, client, `{"id": "l-2", "error": {"class": "GenericError", "desc": "no \"module\""}}`+"\r\n")
	client.CloseWrite()
	// The white space before a command goes with it.
	expectAll(t, qemu, `{"execute":"query-status","id":1}`+"\r\n"+`{"execute":"quit","id":3}`+"\r\n")
	qemu.Close()
	expectAll(t, client, "")
	end()
}

func TestARefusalWaitsForTheEndOfAMessage(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{gate: true, refusal: "no"})
	end := running(t, client, qemu, r)
	send(t, qemu, `{"return": `)
	expect(t, client, `{"return": `)
	send(t, client, `{"execute":"cont"}`)
	eventually(t, "a refusal that is queued", func() bool { // a wrong relay answers at once
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.toClient.queued) > 0
	})
	send(t, qemu, `{}}`+"\r\n"+`{"event": "X"}`+"\r\n")
	qemu.Close()
	expect(t, client, `{}}{"error": {"class": "GenericError", "desc": "no"}}`+"\r\n\r\n"+`{"event": "X"}`+"\r\n")
	if n, _ := client.Read(make([]byte, 1)); n != 0 {
		t.Error("more comes")
	}
	end()
}

// tag makes a file that can be recognised on the other side.
func tag(t *testing.T, name string) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

func TestRelayCarriesDescriptorsBothWays(t *testing.T) {
	for _, gate := range []bool{false, true} {
		o := &seen{gate: gate, refusal: "never asked"}
		client, qemu, end := between(t, o)
		for _, direction := range []struct{ from, to *net.UnixConn }{{client, qemu}, {qemu, client}} {
			for _, count := range []int{1, 3, 253} {
				var fds []int
				var files []*os.File
				for i := range count {
					f := tag(t, fmt.Sprint("fd", i))
					files = append(files, f)
					fds = append(fds, int(f.Fd()))
				}
				text := fmt.Sprintf(`{"execute":"getfd","id":%d}`+"\r\n", count)
				if _, _, err := direction.from.WriteMsgUnix([]byte(text), unix.UnixRights(fds...), nil); err != nil {
					t.Fatal(err)
				}
				for _, f := range files {
					f.Close()
				}
				buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(maxFDs*4))
				n, oobn, flags, _, err := direction.to.ReadMsgUnix(buf, oob)
				if err != nil || flags&unix.MSG_CTRUNC != 0 || !strings.HasPrefix(text, string(buf[:n])) || n == 0 {
					t.Fatalf("got %q, flags %x, %v", buf[:n], flags, err)
				}
				got, err := parseFDs(oob[:oobn])
				if err != nil || len(got) != count {
					t.Fatalf("%d descriptors arrived, want %d: %v", len(got), count, err)
				}
				for i, fd := range got {
					if name, _ := os.Readlink(fmt.Sprint("/proc/self/fd/", fd)); name != fmt.Sprintf("/memfd:fd%d (deleted)", i) {
						t.Errorf("descriptor %d is %s", i, name)
					}
				}
				closeAll(got)
				for n < len(text) {
					more, err := direction.to.Read(buf)
					if err != nil {
						t.Fatal(err)
					}
					n += more
				}
			}
		}
		end()
	}
}

func TestRelayWithoutAPeerEnds(t *testing.T) {
	for _, first := range []string{"client", "qemu"} {
		client, qemu, end := between(t, &seen{})
		gone, other := client, qemu
		if first == "qemu" {
			gone, other = qemu, client
		}
		gone.Close()
		expectAll(t, other, "")
		end()
	}
}

// A client that is stopped while QEMU has much to say: the relay keeps no more of it than sockets and a pipe hold, says so once, and
// the client finds all of it when it goes on.
func TestAClientThatDoesNotRead(t *testing.T) {
	defer func(was time.Duration) { unreadAfter = was }(unreadAfter)
	unreadAfter = 50 * time.Millisecond
	o := &seen{}
	client, qemu, end := between(t, o)
	told := func(what string) (n int) {
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, line := range o.log {
			if line == what {
				n++
			}
		}
		return n
	}
	const event = `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}` + "\r\n"
	sent := 0
	for stuck := 0; stuck < 2; {
		_ = qemu.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := qemu.Write([]byte(event)[sent%len(event):])
		if sent += n; err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			stuck++
		}
		if sent > 4*maxQueue {
			t.Fatalf("QEMU gets rid of %d bytes that nobody reads", sent)
		}
	}
	if told("unread true") != 1 || told("unread false") != 0 {
		t.Errorf("while it doesn't read: %d and %d", told("unread true"), told("unread false"))
	}
	// The other way is open.
	const command = `{"execute":"query-status"}` + "\n"
	send(t, client, command)
	expect(t, qemu, command)
	expect(t, client, strings.Repeat(event, sent/len(event)+1)[:sent])
	end()
	if told("unread true") != 1 || told("unread false") != 1 {
		t.Errorf("when it reads again: %d and %d", told("unread true"), told("unread false"))
	}
}
