package node

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

// A process is one for good: until await says that it has ended, its pid belongs to no other.
type process struct {
	pid     int
	started uint64
	file    *os.File // the pidfd
}

func openProcess(pid int) (*process, error) {
	fd, err := host.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil { // for Go's poller: hundreds of them wait without a thread each
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &process{pid: pid, file: os.NewFile(uintptr(fd), fmt.Sprintf("process %d", pid))}
	// Read behind the opening: what is read is of the process that was opened, or it has ended.
	stat, err := host.ReadStat(pid)
	if err != nil {
		p.close()
		return nil, err
	}
	p.started = stat.Started
	return p, nil
}

func (p *process) close() { p.file.Close() }

// await waits for the end of the process, for so long at most, and not beyond ctx; 0 is for ever.
func (p *process) await(ctx context.Context, most time.Duration) (ended bool) {
	if most > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, most)
		defer cancel()
	}
	_ = p.file.SetReadDeadline(time.Time{})
	given := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = p.file.SetReadDeadline(time.Unix(1, 0))
		close(given)
	})
	defer func() {
		if !stop() {
			<-given // so that it doesn't cut the next wait short
		}
	}()
	raw, err := p.file.SyscallConn()
	if err != nil {
		return true
	}
	_ = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		ended = n == 1 && err == nil
		return ended
	})
	return ended
}
