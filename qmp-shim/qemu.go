package shim

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// A process names a process for good: as long as fd is open, its pid belongs to no other.
type process struct {
	pid int
	fd  int // pidfd
}

func openProcess(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return process{}, fmt.Errorf("watching process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	return process{pid: pid, fd: fd}, nil
}

// wait returns when the process has ended.
func (p process) wait() { host.AwaitEnd(p.fd) }

// findQEMU is attach.FindListening.
func findQEMU(ctx context.Context, pidFile, path string) (process, error) {
	pid, fd, err := attach.FindListening(ctx, pidFile, path)
	return process{pid: pid, fd: fd}, err
}

// loadModule has the module in process p, by ptrace unless it is there already, and opens its page. The page's
// descriptor is the caller's.
func loadModule(ctx context.Context, p process, module string) (page *clockpage.Page, own int, method string, err error) {
	fd, there, err := attach.Loaded(p.pid)
	if err != nil {
		return nil, -1, "", err
	}
	if !there {
		if _, err := attach.Load(ctx, p.pid, module); err != nil {
			return nil, -1, "", err
		}
		if fd, there, err = attach.Loaded(p.pid); err != nil {
			return nil, -1, "", err
		}
		if !there {
			return nil, -1, "", fmt.Errorf("%s was loaded into process %d but stays silent: it found no place for itself in that QEMU", module, p.pid)
		}
	}
	method = "ptrace"
	if environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid)); err == nil && preloads(environ) {
		method = "preload"
	}
	own, err = unix.Open(fmt.Sprintf("/proc/%d/fd/%d", p.pid, fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, -1, "", fmt.Errorf("opening the clock page of process %d: %w", p.pid, err)
	}
	f, err := reopen(own)
	if err == nil {
		defer f.Close()
		page, err = clockpage.Map(f)
	}
	if err != nil {
		_ = unix.Close(own)
		return nil, -1, "", fmt.Errorf("opening the clock page of process %d: %w", p.pid, err)
	}
	return page, own, method, nil
}

// preloads says whether a process was started with the module in LD_PRELOAD.
func preloads(environ []byte) bool {
	for variable := range bytes.SplitSeq(environ, []byte{0}) {
		if value, ok := bytes.CutPrefix(variable, []byte("LD_PRELOAD=")); ok && bytes.Contains(value, []byte(metadata.Module)) {
			return true
		}
	}
	return false
}
