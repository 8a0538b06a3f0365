// Needed by: the shim's relay, which makes its system calls without telling Go's scheduler, and so must never be kept
// waiting in one. A splice into a socket that takes no more has to say so, though only the socket, and not the call, is
// marked as one that doesn't wait.

package kernel

import (
	"errors"
	"testing"
	"time"

	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

func TestSpliceIntoAFullSocketDoesNotWait(t *testing.T) {
	from, to := pair(t)
	check.NoError(t, unix.SetNonblock(from, true))
	var ends [2]int
	check.NoError(t, unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	said := make(chan error, 1)
	go func() {
		chunk := make([]byte, 32<<10)
		for sent := 0; sent < 64<<20; {
			if _, err := unix.Write(ends[1], chunk); err != nil && !errors.Is(err, unix.EAGAIN) {
				said <- err
				return
			}
			n, err := unix.Splice(ends[0], nil, from, nil, len(chunk), unix.SPLICE_F_MOVE)
			if err != nil {
				said <- err
				return
			}
			sent += int(n)
		}
		said <- nil
	}()
	select {
	case err := <-said:
		if !errors.Is(err, unix.EAGAIN) {
			t.Fatalf("a full socket says %v, not EAGAIN", err)
		}
	case <-time.After(2 * time.Minute):
		t.Error("it waits")
		unix.Close(to) // ends the wait
		<-said
		return
	}
	// What it took is there, and then there is room again.
	poll := func() bool {
		p := []unix.PollFd{{Fd: int32(from), Events: unix.POLLOUT}}
		n, err := unix.Poll(p, 0)
		return err == nil && n == 1 && p[0].Revents == unix.POLLOUT
	}
	if poll() {
		t.Error("a full socket is writable")
	}
	buf := make([]byte, 1<<20)
	for !poll() {
		if n, err := unix.Read(to, buf); err != nil || n == 0 {
			t.Fatal("nothing is left to read, and the socket isn't writable: ", err)
		}
	}
}
