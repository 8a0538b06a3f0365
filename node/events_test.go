package node

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/test/check"
)

// message is one of the kernel's.
func message(what uint32, data ...uint32) []byte {
	native := binary.NativeEndian
	m := make([]byte, 52+4*len(data))
	native.PutUint32(m[16:], cnProc)
	native.PutUint32(m[20:], cnProc)
	native.PutUint32(m[28:], 7)
	native.PutUint32(m[36:], what)
	for i, word := range data {
		native.PutUint32(m[52+4*i:], word)
	}
	return m
}

func TestParseEvent(t *testing.T) {
	const other = 1
	foreign := message(eventExec, 4712, 4711)
	foreign[16] = 9
	for _, c := range []struct {
		what    string
		message []byte
		want    event
	}{
		{"execve, of a thread", message(eventExec, 4712, 4711), event{what: eventExec, ack: 7, pid: 4711}},
		{"fork", message(1, 4712, 4711, 4713, 4713), event{what: other, ack: 7}},
		{"yes", message(eventNone, 0), event{what: eventNone, ack: 7}},
		{"no", message(eventNone, uint32(unix.EPERM)), event{what: eventNone, ack: 7, err: uint32(unix.EPERM)}},
		{"cut short", message(eventExec, 4712), event{what: other, ack: 7}},
		{"no body", message(eventExec)[:40], event{what: other}},
		{"another connector's", foreign, event{what: other}},
		{"empty", nil, event{what: other}},
	} {
		if got := parseEvent(c.message); got != c.want {
			t.Errorf("%s: %+v", c.what, got)
		}
	}
}

func FuzzParseEvent(f *testing.F) {
	f.Add(message(eventExec, 4712, 4711))
	f.Add(message(eventNone, 1))
	f.Fuzz(func(t *testing.T, message []byte) {
		if e := parseEvent(message); e.what == eventExec && len(message) < 60 {
			t.Errorf("%+v", e)
		}
	})
}

// Where the kernel tells, it tells of each execve, and of nothing else. Elsewhere, as in a container, it says why it doesn't.
func TestConnector(t *testing.T) {
	events, err := Connector()
	if err != nil {
		t.Skip(err, "; fix: run the tests on a host, not in a container; test/node does")
	}
	for range 10 {
		cmd := exec.Command("true")
		check.NoError(t, cmd.Run())
		for pid := 0; pid != cmd.Process.Pid; {
			if pid, err = events.Next(); err != nil || pid <= 0 {
				t.Fatal(pid, err)
			}
		}
	}
	go events.Close()
	for err == nil {
		_, err = events.Next()
	}
	if !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}
