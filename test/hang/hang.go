// Package hang makes a file system that hangs, as NFS does without its server: a FUSE that nobody serves. Everything that is
// asked of it waits.
package hang

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Alone runs the test once more, in a process with a mount namespace of its own. It returns true in there alone.
func Alone(t *testing.T) bool {
	t.Helper()
	const inside = "FTCLOCK_ALONE"
	if os.Getenv(inside) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// Dir is a directory on such a file system, for a test that is Alone.
func Dir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ftclock-hang-")
	if err != nil {
		t.Fatal(err)
	}
	end, err := Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		end()
		// What waited for the file system may go on in the directory below it, now or a little later.
		for try := 0; os.RemoveAll(dir) != nil && try < 100; try++ {
			time.Sleep(10 * time.Millisecond)
		}
	})
	return dir
}

// Mount hides dir behind such a file system until end is called. What waits then gets an error. The caller must be in a mount
// namespace that is its own: a process that is killed leaves the mount behind.
func Mount(dir string) (end func(), err error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/fuse: %w", err)
	}
	if err := unix.Mount("ftclock-hang", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("mount", err)
	}
	return func() {
		_ = unix.Close(fd)
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}, nil
}
