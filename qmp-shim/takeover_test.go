package shim

import (
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAWorkerGoesOnFromAnyState begins relays with everything that a worker which died may have left: what the pipe
// holds, the words, and what is still to be read.
func TestAWorkerGoesOnFromAnyState(t *testing.T) {
	for _, c := range []struct {
		name       string
		carry, mid uint32
		pipe, rest string // left in the pipe; still in the source
		arrives    string
		sees       string
	}{
		{"between two messages", carryNone, 0, "", `{"execute":"stop"}` + "\n", `{"execute":"stop"}` + "\n", "[command stop]"},
		{"with bytes under way", carryNone, 1, `{"a":"`, `{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n",
			`{"a":"{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"within a message", carryNone, 1, "", `{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"a carrier sent, not taken away", carrySent, 1, "", "{}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier sent and taken away", carrySent, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done, in the pipe", carryDone, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done", carryDone, 1, "", "}\n{}\n", "}\n{}\n", "[]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, inner1 := pair(t)
			qemu, inner2 := pair(t)
			o := &seen{}
			r := &relay{client: inner1, qemu: inner2, observer: o}
			for i := range r.pipes {
				var ends [2]int
				if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
					t.Fatal(err)
				}
				defer closeAll(ends[:])
				r.pipes[i], r.mid[i], r.carry[i] = pipe{ends[0], ends[1]}, new(uint32), new(uint32)
			}
			*r.mid[up], *r.carry[up] = c.mid, c.carry
			if _, err := unix.Write(r.pipes[up].w, []byte(c.pipe)); err != nil {
				t.Fatal(err)
			}
			if _, err := client.Write([]byte(c.rest)); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- r.run() }()
			_ = client.CloseWrite()
			got, err := io.ReadAll(qemu)
			if err != nil || string(got) != c.arrives {
				t.Errorf("%q arrives, not %q: %v", got, c.arrives, err)
			}
			qemu.Close()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if log := fmt.Sprint(o.log); log != c.sees {
				t.Errorf("sees %s, not %s", log, c.sees)
			}
			if *r.carry[up] != carryNone {
				t.Error("the word is left set")
			}
		})
	}
}

// TestTheWordMidIsSetWithinAMessage looks at what a worker that dies now would leave.
func TestTheWordMidIsSetWithinAMessage(t *testing.T) {
	client, inner1 := pair(t)
	qemu, inner2 := pair(t)
	r := &relay{client: inner1, qemu: inner2, observer: &seen{}}
	for i := range r.pipes {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer closeAll(ends[:])
		r.pipes[i], r.mid[i], r.carry[i] = pipe{ends[0], ends[1]}, new(uint32), new(uint32)
	}
	done := make(chan error, 1)
	go func() { done <- r.run() }()
	for _, step := range []struct {
		text string
		mid  uint32
	}{{`{"execute":`, 1}, {`"stop"}`, 0}, {"\r", 0}, {"\n{", 1}, {"}\n", 0}} {
		if _, err := client.Write([]byte(step.text)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(qemu, make([]byte, len(step.text))); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(20 * time.Second); atomic.LoadUint32(r.mid[up]) != step.mid; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("behind %q the word is %d", step.text, *r.mid[up])
			}
		}
	}
	client.Close()
	qemu.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
