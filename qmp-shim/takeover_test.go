package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/keeper"
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
		{"with a message under way", carryNone, 0, `{"execute":"cont"}` + "\n", `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"with a message under way that wasn't seen yet", carryNone, 1, `{"execute":"cont"}`, "\r\n" + `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}` + "\r\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"within a message", carryNone, 1, "", `{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"a carrier sent, not taken away", carrySent, 1, "", "{}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier sent and taken away", carrySent, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done, in the pipe", carryDone, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done", carryDone, 1, "", "}\n{}\n", "}\n{}\n", "[]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &seen{}
			client, qemu, r := unstarted(t, o)
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

// TestTheWordMidIsOfWhatIsBehindThePipe looks at what a worker leaves that dies while QEMU doesn't read: the pipe, which the next one
// sends first, has a whole message, and a recogniser can begin behind it.
func TestTheWordMidIsOfWhatIsBehindThePipe(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{})
	done := make(chan error, 1)
	go func() { done <- r.run() }()
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	waiting := func() (n int) { // what the relay hasn't taken yet
		_ = raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		return n
	}
	message := `{"a":"` + strings.Repeat("x", 1000) + `"}`
	// A relay that only waits for a processor looks the same, but not for long.
	const looks = 20
	deadline := time.Now().Add(2 * time.Minute)
	for alike := 0; alike < looks; {
		if waiting() == 0 {
			alike = 0
			_, err = client.Write([]byte(message))
		}
		if err != nil {
			t.Fatal(err)
		}
		left, pipeErr := unix.IoctlGetInt(r.pipes[up].r, unix.TIOCINQ)
		mid := atomic.LoadUint32(r.mid[up])
		if left > 0 && waiting() > 0 && mid == 0 {
			alike++
			time.Sleep(10 * time.Millisecond)
			continue
		}
		alike = 0
		if pipeErr != nil || time.Now().After(deadline) {
			t.Fatalf("the pipe has %d bytes (%v), %d aren't taken, and the word is %d", left, pipeErr, waiting(), mid)
		}
	}
	client.Close()
	qemu.Close()
	if err := <-done; err != nil {
		t.Error(err)
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
		for end := time.Now().Add(2 * time.Minute); atomic.LoadUint32(r.mid[up]) != step.mid; time.Sleep(time.Millisecond) {
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

// TestARefusalComesBetweenMessages has the last worker die within a message of QEMU's, and the next one refuse a cont: whatever of
// that message is still to come goes first.
func TestARefusalComesBetweenMessages(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{gate: true, refusal: "no"})
	*r.mid[down] = 1
	if _, err := unix.Write(r.pipes[down].w, []byte(`{"return": `)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte(`{"execute":"cont","id":1}` + "\n")); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.run() }()
	time.Sleep(100 * time.Millisecond) // enough for a refusal that doesn't wait
	if _, err := qemu.Write([]byte("{}}\r\n")); err != nil {
		t.Fatal(err)
	}
	want := `{"return": {}}` + "\r\n" + `{"id": 1, "error": {"class": "GenericError", "desc": "no"}}` + "\r\n"
	got := make([]byte, len(want))
	_ = client.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if n, err := io.ReadFull(client, got); err != nil || string(got) != want {
		t.Errorf("%q arrives, not %q: %v", got[:n], want, err)
	}
	qemu.Close()
	client.Close()
	<-done
}

// A worker may die after it has bound the monitor's socket, and before anybody but it has that. The next one binds it anew.
func TestASocketThatNobodyHasIsBoundAnew(t *testing.T) {
	for _, renamed := range []bool{true, false} {
		store, err := keeper.Open(func(what string) { t.Error(what) })
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		files := []string{control.MonitorSocket}
		if renamed {
			files = append(files, control.QEMUSocket)
		}
		for _, name := range files {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			_ = l.Close()
		}
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		store.Put(fdDir, fd)
		s := &shim{Config: Config{DomainDir: dir, Store: store, Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
		err = s.bind()
		if (err == nil) != renamed { // without QEMU's socket it may be libvirt's own
			t.Errorf("QEMU's socket is there %v: %v", renamed, err)
		}
		if err == nil {
			if conn, err := net.Dial("unix", filepath.Join(dir, control.MonitorSocket)); err != nil {
				t.Error(err)
			} else {
				_ = conn.Close()
			}
			s.unbind()
		}
		store.Drop(fdDir)
	}
}

// Requests that can't be answered, as where a disk hangs, don't take the descriptors that the monitor needs.
func TestRequestsAreBounded(t *testing.T) {
	before := len(openFDs())
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{Config: Config{Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.serveControl(l)
	}()
	var held []net.Conn
	for range maxRequests {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn) // and says nothing
	}
	hungUp := func() bool {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = conn.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	for end := time.Now().Add(2 * time.Minute); !hungUp(); {
		if time.Now().After(end) {
			t.Fatal("one more is taken")
		}
	}
	_ = held[0].Close()
	defer func() {
		for _, conn := range held {
			_ = conn.Close()
		}
		for end := time.Now().Add(2 * time.Minute); len(openFDs()) > before && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // the other ends
		}
	}()
	for end := time.Now().Add(2 * time.Minute); hungUp(); {
		if time.Now().After(end) {
			t.Fatal("none is taken any more")
		}
	}
	_ = l.Close()
	<-ended
}

// Who publishes the domain's anchor tells the shim, and the status has it.
func TestThePublishedAnchorIsInTheStatus(t *testing.T) {
	store, err := keeper.Open(func(what string) { t.Error(what) })
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{Config: Config{Store: store, Log: zerolog.Nop()}, domain: testDomain(t, byDefault)}
	published := func() time.Time {
		t.Helper()
		answer := s.answer(control.Request{Do: "policy", Clock: byDefault})
		if answer.Error != "" {
			t.Fatal(answer.Error)
		}
		return answer.Status.Published
	}
	if at := published(); !at.IsZero() {
		t.Errorf("before: %v", at)
	}
	before := time.Now()
	if answer := s.answer(control.Request{Do: "published"}); answer.Error != "" {
		t.Fatal(answer.Error)
	}
	if at := published(); at.Before(before) || at.After(time.Now()) {
		t.Errorf("after: %v", at)
	}
}

// What a worker of another version left, or one that died at its first breath, is begun anew; but a domain that runs isn't left, and
// never refused a cont.
func TestAStateThatCannotBeReadIsBegunAnew(t *testing.T) {
	for what, began := range map[string]bool{"empty": false, "another version's": true} {
		store, err := keeper.Open(func(what string) { t.Error(what) })
		if err != nil {
			t.Fatal(err)
		}
		fd, err := newState()
		if err != nil {
			t.Fatal(err)
		}
		if began {
			head := binary.LittleEndian.AppendUint64(nil, stateMagic)
			if _, err := unix.Pwrite(fd, append(head, 99), 0); err != nil {
				t.Fatal(err)
			}
		}
		store.Put(fdState, fd)
		required := `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="yes"/>`
		s := &shim{Config: Config{Store: store, Log: zerolog.Nop(), Clock: required, DomainDir: "/"}}
		if err := s.remember(); err != nil {
			t.Fatal(err)
		}
		if s.domain.memory.Began != began || s.domain.gate {
			t.Errorf("%s: began %t, gate %t", what, s.domain.memory.Began, s.domain.gate)
		}
		store.Drop(fdState)
	}
}
