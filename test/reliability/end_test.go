package reliability

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/test/check"
)

// TestLastWordsSurviveAKill has QEMU say its last words and end, and kills the worker before anybody has read them.
func TestLastWordsSurviveAKill(t *testing.T) {
	for _, size := range []int{100, 100 << 10} {
		for range 5 {
			p := startPair(t)
			p.settled()
			s := p.whole()
			last := append(bytes.Repeat([]byte("x"), size), '\n')
			check.Value(p.qemu.Write(last))(t)
			p.qemu.Close()
			p.endProcess()
			_ = unix.Kill(s.Shim, unix.SIGKILL)
			got, err := io.ReadAll(p.client)
			if err != nil && !errors.Is(err, unix.ECONNRESET) || !bytes.Equal(got, last) {
				t.Fatalf("of %d bytes %d arrived: %v\n%s", len(last), len(got), err, p.logText())
			}
			p.client.Close()
			p.gone()
		}
	}
}

// TestAKillWhileTheReaderWaits kills the worker while a message with descriptors waits for the other side to read.
func TestAKillWhileTheReaderWaits(t *testing.T) {
	for range 5 {
		p := startPair(t)
		p.settled()
		s := p.whole()
		speaker := newSpeaker(p.client, 1, "")
		said := make(chan error, 1)
		go func() {
			var err error
			for range 200 {
				err = errors.Join(err, speaker.sayWith(3000, 2))
			}
			said <- err
		}()
		// Full: the relay can't have moved any more when two looks find the same.
		for range 3 {
			eventually(t, "QEMU's socket being full", func() bool { return settledQueue(p.qemu) })
			s = p.killWorker(s)
		}
		listener := newListener(p.qemu)
		failed := make(chan error, 1)
		go func() { failed <- listener.listen() }()
		eventually(t, "all messages", func() bool {
			select {
			case err := <-failed:
				t.Fatalf("%v\n%s", err, p.logText())
			default:
			}
			return listener.heard.Load() == 200
		})
		check.NoError(t, <-said)
		p.client.Close()
		p.qemu.Close()
		p.endProcess()
		<-failed
		p.gone()
	}
}

// TestAWorkerBeginsWithoutItsDirectory takes away, on a host in trouble, what a worker could do without: it makes it anew, and
// where it can't, it serves without.
func TestAWorkerBeginsWithoutItsDirectory(t *testing.T) {
	for _, anew := range []bool{true, false} {
		t.Run(fmt.Sprintf("can make it anew %v", anew), func(t *testing.T) { withoutDirectory(t, anew) })
	}
}

func withoutDirectory(t *testing.T, anew bool) {
	p := startPair(t)
	p.settled()
	s := p.whole()
	hidden := p.state + ".away"
	check.NoError(t, os.Rename(p.state, hidden))
	if !anew {
		check.NoError(t, os.WriteFile(p.state, nil, 0o600))
	}
	check.NoError(t, unix.Kill(s.Shim, unix.SIGKILL))
	for i := range 3 {
		text := fmt.Sprintf(`{"n":%d}`+"\n", i)
		check.Value(p.client.Write([]byte(text)))(t)
		if got, err := bytesUntil(p.qemu, '\n'); err != nil || string(got) != text {
			t.Fatalf("%q, %v\n%s", got, err, p.logText())
		}
	}
	if !anew {
		check.NoError(t, errors.Join(os.Remove(p.state), os.Rename(hidden, p.state)))
	}
	check.Value(os.Stat(filepath.Join(p.state, p.uuid, control.SocketName)))(t)
	p.killKeeper(p.whole())
	p.client.Close()
	p.qemu.Close()
	p.endProcess()
	p.gone()
}

// TestAnotherSocketIsLeftAlone ends a pair in whose place the hook has put libvirt's own socket back.
func TestAnotherSocketIsLeftAlone(t *testing.T) {
	p := startPair(t)
	p.settled()
	p.killWorker(p.whole()) // a later worker knows what the first one bound
	path := filepath.Join(p.dir, control.MonitorSocket)
	check.NoError(t, os.WriteFile(path+".other", nil, 0o600))
	check.NoError(t, os.Rename(path+".other", path))
	p.qemu.Close()
	p.endProcess()
	p.client.Close()
	eventually(t, "the end of every process of the pair", func() bool { return len(p.processes()) == 0 })
	if _, err := os.Stat(path); err != nil {
		t.Errorf("it was removed: %v", err)
	}
}
