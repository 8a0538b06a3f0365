package shim

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/host"
)

// A worker may come long after the last one, and QEMU have ended meanwhile. The pid that the last one left is another process's then.
func TestModuleIsLoadedIntoNoOtherProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := host.OpenProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	s := &shim{Config: Config{Module: "/no/module"}}
	if _, _, _, err := s.loadModule(t.Context(), process{pid: os.Getpid(), fd: pidfd}); !errors.Is(err, attach.ErrGone) {
		t.Errorf("%v, want that it is gone", err)
	}
}
