package relay

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// nonsense is what a QEMU that a guest has taken over may say. Each ends its line, and is written in pieces.
var nonsense = []struct {
	name string
	text func(w io.Writer)
}{
	{"a string without an end", func(w io.Writer) {
		fmt.Fprint(w, `{"event": "`)
		x := bytes.Repeat([]byte("x"), 1<<20)
		for range 64 {
			_, _ = w.Write(x)
		}
		fmt.Fprint(w, "\n")
	}},
	{"a key without an end", func(w io.Writer) {
		fmt.Fprint(w, `{"`, strings.Repeat("k", 1<<20), "\n")
	}},
	{"an id without an end", func(w io.Writer) {
		fmt.Fprint(w, `{"id": [`, strings.Repeat("1,", 1<<20), "}\n")
	}},
	{"a million brackets", func(w io.Writer) { fmt.Fprint(w, strings.Repeat("[", 1_000_000), "\n") }},
	{"a million braces", func(w io.Writer) { fmt.Fprint(w, strings.Repeat(`{"a":`, 1_000_000), "\n") }},
	{"closing brackets", func(w io.Writer) { fmt.Fprint(w, strings.Repeat("]}", 100_000), "\n") }},
	{"events", func(w io.Writer) {
		block := strings.Repeat(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_IO_ERROR"}`+"\r\n", 1000)
		for range 200 {
			fmt.Fprint(w, block)
		}
	}},
	{"invalid UTF-8", func(w io.Writer) { fmt.Fprint(w, "{\"event\": \"\xff\xfe\x80\xc0\"}\n\xff\xff\n") }},
	{"NULs", func(w io.Writer) { _, _ = w.Write(append(make([]byte, 1<<20), '\n')) }},
	{"half escapes", func(w io.Writer) { fmt.Fprint(w, "{\"event\": \"\\u12\n\"\\\n") }},
	{"noise", func(w io.Writer) {
		b := make([]byte, 4<<20)
		random := rand.NewChaCha8([32]byte{1})
		_, _ = random.Read(b)
		_, _ = w.Write(append(b, '\n'))
	}},
}

func TestARelayOutlivesNonsense(t *testing.T) {
	for _, gate := range []bool{false, true} {
		o := &seen{gate: gate}
		client, qemu, end := between(t, o)
		for _, c := range nonsense {
			t.Run(fmt.Sprint(c.name, gate), func(t *testing.T) {
				marker := fmt.Sprintf(`{"event": "AFTER %s"}`, c.name)
				var group sync.WaitGroup
				defer group.Wait()
				var sent counter
				group.Go(func() {
					c.text(io.MultiWriter(qemu, &sent))
					fmt.Fprint(io.MultiWriter(qemu, &sent), marker, "\n")
				})
				got := 0
				buf := make([]byte, 256<<10)
				var tail []byte
				for !bytes.HasSuffix(tail, []byte(marker+"\n")) {
					n, err := client.Read(buf)
					if err != nil {
						t.Fatal(err)
					}
					got += n
					tail = append(tail, buf[:n]...)
					tail = tail[max(0, len(tail)-len(marker)-1):]
				}
				group.Wait()
				if got != int(sent) {
					t.Errorf("%d bytes became %d", sent, got)
				}
				if want := "qemu AFTER " + c.name; o.newest() != want {
					t.Errorf("the recogniser doesn't see the next message: %q, not %q", o.newest(), want)
				}
			})
		}
		unasked(t, client, qemu)
		end()
	}
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	if after.HeapSys > 200<<20 {
		t.Errorf("the heap grew to %d MiB", after.HeapSys>>20)
	}
}

// unasked has QEMU send descriptors that nobody asked for.
func unasked(t *testing.T, client, qemu *net.UnixConn) {
	f := tag(t, "unasked")
	defer f.Close()
	fds := make([]int, maxFDs)
	for i := range fds {
		fds[i] = int(f.Fd())
	}
	for range 20 {
		go func() { _, _, _ = qemu.WriteMsgUnix([]byte("{}\n"), unix.UnixRights(fds...), nil) }()
		oob, buf := make([]byte, unix.CmsgSpace(maxFDs*4)), make([]byte, 1)
		for range 3 {
			_, oobn, _, _, err := client.ReadMsgUnix(buf, oob)
			if err != nil {
				t.Fatal(err)
			}
			came, _ := parseFDs(oob[:oobn])
			closeAll(came)
		}
	}
}

type counter int

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// TestAClientThatLeavesInTheMiddle ends while the relay waits for the rest of what may be the first cont.
func TestAClientThatLeavesInTheMiddle(t *testing.T) {
	client, qemu, end := between(t, &seen{gate: true})
	send(t, client, `{"execu`)
	client.Close()
	expectAll(t, qemu, `{"execu`)
	end()
}
