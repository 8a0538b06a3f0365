package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// A process names a process for good: until fd says that it has ended, its pid belongs to no other.
type process struct {
	pid int
	fd  int // pidfd
}

// wait returns when the process has ended.
func (p process) wait() { host.AwaitEnd(p.fd) }

// loadModule has the module in process p, by ptrace unless it is there already, and opens its page. The page's
// descriptor is the caller's.
func (s *shim) loadModule(ctx context.Context, p process) (page *clockpage.Page, own int, method string, err error) {
	module, load := s.Module, attach.Load
	if s.Sealed {
		load = attach.LoadSealed
	}
	if host.Ended(p.fd) { // while no worker looked: its pid may be another QEMU's by now
		return nil, -1, "", fmt.Errorf("loading the module into QEMU: %w", attach.ErrGone)
	}
	fd, there, err := attach.Loaded(p.pid)
	if err == nil && !there {
		if _, err = load(ctx, p.pid, module); err == nil {
			fd, there, err = attach.Loaded(p.pid)
		}
		if err == nil && !there {
			err = fmt.Errorf("%s was loaded into process %d but stays silent: it found no place for itself in that QEMU", module, p.pid)
		}
	}
	if err != nil {
		return nil, -1, "", err
	}
	method = "ptrace"
	if environ, err := host.ReadText(fmt.Sprintf("/proc/%d/environ", p.pid)); err == nil && preloads(environ) {
		method = "preload"
	}
	own, err = unix.Open(fmt.Sprintf("/proc/%d/fd/%d", p.pid, fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, -1, "", fmt.Errorf("opening the clock page of process %d: %w", p.pid, err)
	}
	if page, err = mapPage(own); err != nil {
		_ = unix.Close(own)
		return nil, -1, "", fmt.Errorf("opening the clock page of process %d: %w", p.pid, err)
	}
	return page, own, method, nil
}

// mapPage maps the page behind a descriptor, which stays the caller's.
func mapPage(fd int) (*clockpage.Page, error) {
	f, err := reopen(fd)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return clockpage.Map(f)
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

// loadWait bounds one attempt to load the module. It ends before a cont that waits for it gives up.
const loadWait = 10 * time.Second

// load is one attempt to have the module in QEMU.
func (s *shim) load(answer heard) {
	ctx, cancel := context.WithTimeout(context.Background(), loadWait)
	defer cancel()
	p := s.knownQEMU()
	if p.pid == 0 {
		var err error
		p.pid, p.fd, err = attach.FindListening(ctx, s.PIDFile, filepath.Join(s.DomainDir, control.MonitorSocket))
		if err != nil {
			answer(nil, "", err)
			return
		}
		s.keepQEMU(p)
	}
	page, fd, method, err := s.loadModule(ctx, p)
	// A main thread that is never idle doesn't answer a cont either: it still pins memory, or loads a state.
	for end := time.Now().Add(busyWait); s.mode() == control.Relay && errors.Is(err, attach.ErrBusy) && time.Now().Before(end) && s.qemuLives(); {
		s.domain.module.isBusy(err)
		time.Sleep(200 * time.Millisecond) // of a process that is stopped it is known at once
		again, cancel := context.WithTimeout(context.Background(), loadWait)
		page, fd, method, err = s.loadModule(again, p)
		cancel()
	}
	if err == nil {
		s.Store.Put(fdPage, fd)
	}
	answer(page, method, err)
	if err == nil { // the first cont waits for this, too
		s.importState()
	}
	debug.FreeOSMemory() // reading QEMU's symbols took more than everything else together
}
