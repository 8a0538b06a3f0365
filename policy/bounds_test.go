package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/test/check"
)

// opened counts which files of a directory are opened while f runs, as the kernel tells it: inotify(7).
func opened(t *testing.T, dir string, f func()) int {
	t.Helper()
	fd := check.Value(unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK))(t)
	defer unix.Close(fd)
	check.Value(unix.InotifyAddWatch(fd, dir, unix.IN_OPEN))(t)
	f()
	n, buf := 0, make([]byte, 1<<16)
	for {
		size, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return n
		}
		check.NoError(t, err)
		for at := 0; at < size; {
			// struct inotify_event: wd, mask, cookie, len, name. An event of the directory itself has no name.
			mask := uint32(buf[at+4]) | uint32(buf[at+5])<<8 | uint32(buf[at+6])<<16 | uint32(buf[at+7])<<24
			length := int(buf[at+12]) | int(buf[at+13])<<8
			if mask&unix.IN_Q_OVERFLOW != 0 {
				t.Fatal("too many to be counted")
			}
			if length > 0 {
				n++
			}
			at += unix.SizeofInotifyEvent + length
		}
	}
}

// bytesRead is how many bytes this process has read: proc_pid_io(5).
func bytesRead(t *testing.T) (n int64) {
	t.Helper()
	text := check.Value(os.ReadFile("/proc/self/io"))(t)
	if _, err := fmt.Sscanf(string(text), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A start waits for no more than the most files that there may be, each no longer than it may be, whatever lies in the directory.
func TestWhatIsReadIsBounded(t *testing.T) {
	dir := t.TempDir()
	read := func(files int, size int64) (opens int, read int64, err error) {
		t.Helper()
		for i := range files {
			path := filepath.Join(dir, fmt.Sprintf("%05d.xml", i))
			write(t, dir, filepath.Base(path), "web-*", "")
			check.NoError(t, os.Truncate(path, size))
		}
		before := bytesRead(t)
		opens = opened(t, dir, func() { _, err = Read(dir) })
		return opens, bytesRead(t) - before, err
	}
	const slack = 64 << 10 // what this test itself reads
	if opens, n, err := read(MaxFiles, 1<<30); opens != MaxFiles || n > MaxFiles*(maxSize+1)+slack || n < MaxFiles*maxSize || err != nil {
		t.Errorf("%d files of 1 GiB: %d opened, %d bytes read, %v", MaxFiles, opens, n, err)
	}
	if opens, n, err := read(10_000, 1<<30); opens != 0 || n > slack || err == nil || !strings.Contains(err.Error(), "none is used") {
		t.Errorf("10,000 files of 1 GiB: %d opened, %d bytes read, %v", opens, n, err)
	}
}

// What the host's policy adds to a start, as times of what it takes to see that there is no such directory and as itself: with one
// file, the most that there may be, and more than those. All are timed in turn, so that other work on the machine is in each.
func BenchmarkAdds(b *testing.B) {
	counts := []int{0, 1, MaxFiles, 10_000}
	dirs, best := map[int]string{0: filepath.Join(b.TempDir(), "missing")}, map[int]time.Duration{}
	for _, n := range counts[1:] {
		dirs[n] = b.TempDir()
		for i := range n {
			write(b, dirs[n], fmt.Sprintf("%05d.xml", i), "web-*", "")
		}
	}
	d := subject(b, "db")
	for b.Loop() {
		for _, n := range counts {
			began := time.Now()
			files, _ := Read(dirs[n])
			Naming(files, d)
			if took := time.Since(began); best[n] == 0 || took < best[n] {
				best[n] = took
			}
		}
	}
	for _, n := range counts[1:] {
		b.ReportMetric(float64((best[n] - best[0]).Microseconds()), fmt.Sprintf("µs/%d-files", n))
	}
	b.ReportMetric(float64(best[10_000])/float64(best[MaxFiles]), "10000/32")
}
