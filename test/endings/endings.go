// Package endings ends processes that start each other again, as the shim's two do, at a test's end.
package endings

import (
	"time"

	"golang.org/x/sys/unix"
)

// Kill kills all that processes finds, whichever of them is about to start another one, and gives what is left after patience.
// What it finds must be the test's own.
func Kill(processes func() []int, patience time.Duration) (left []int) {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		pids := processes()
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGSTOP)
		}
		if all := processes(); len(all) == len(pids) {
			for _, pid := range all {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
	return processes()
}
