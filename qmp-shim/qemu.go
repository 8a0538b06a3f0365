package shim

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/control"
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
func (p process) wait() {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(fds, -1); n == 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// findQEMU finds the QEMU that listens on the unix socket that was bound to path, by the pid in pidFile. The peer of
// a connection to it can't tell: the kernel names the process that bound the socket, libvirtd. So the pid in the file
// is proven by the socket's inode among the process's descriptors.
func findQEMU(ctx context.Context, pidFile, path string) (process, error) {
	for ; ; time.Sleep(20 * time.Millisecond) {
		p, err := tryQEMU(pidFile, path)
		if err == nil {
			return p, nil
		}
		if ctx.Err() != nil || errors.Is(err, attach.ErrRefused) {
			return process{}, fmt.Errorf("finding QEMU: %w", err)
		}
	}
}

func tryQEMU(pidFile, path string) (process, error) {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return process{}, err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	if err != nil || pid <= 1 {
		return process{}, fmt.Errorf("%s holds no pid", pidFile)
	}
	p, err := openProcess(pid)
	if err != nil {
		return process{}, err
	}
	inodes, err := listeners(path)
	if err == nil {
		var holds bool
		holds, err = holdsSocket(pid, inodes)
		if err == nil && !holds {
			err = fmt.Errorf("process %d, which %s names, doesn't listen on %s", pid, pidFile, path)
		}
	}
	if err != nil {
		_ = unix.Close(p.fd)
		return process{}, err
	}
	return p, nil
}

// listeners gives the inodes of the listening unix sockets that were bound to path (proc(5), /proc/net/unix).
func listeners(path string) (map[string]bool, error) {
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const acceptsConnections = "00010000" // __SO_ACCEPTCON in include/uapi/linux/net.h
	inodes := make(map[string]bool)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// Num RefCount Protocol Flags Type St Inode Path
		head, bound, ok := strings.Cut(lines.Text(), " /")
		if fields := strings.Fields(head); ok && len(fields) == 7 && "/"+bound == path && fields[3] == acceptsConnections {
			inodes["socket:["+fields[6]+"]"] = true
		}
	}
	return inodes, lines.Err()
}

func holdsSocket(pid int, inodes map[string]bool) (bool, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	for _, entry := range entries {
		var target string
		if target, err = os.Readlink(filepath.Join(dir, entry.Name())); err == nil && inodes[target] {
			return true, nil
		}
		if errors.Is(err, os.ErrPermission) {
			break
		}
	}
	if errors.Is(err, os.ErrPermission) {
		return false, fmt.Errorf("looking at process %d: %w: CAP_SYS_PTRACE is missing, or a security module says no", pid, attach.ErrRefused)
	}
	return false, nil // a descriptor that is gone meanwhile, or a process
}

// loadModule has the module in process p, by ptrace unless it is there already, and opens its page. The page's
// descriptor is the caller's.
func loadModule(ctx context.Context, p process, module string) (page *clockpage.Page, own int, method string, err error) {
	fd, there, err := attach.Loaded(p.pid)
	if err == nil && !there {
		if _, err = attach.Load(ctx, p.pid, module); err == nil {
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
	if environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid)); err == nil && preloads(environ) {
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
		p, err = findQEMU(ctx, s.PIDFile, filepath.Join(s.DomainDir, control.MonitorSocket))
		if err != nil {
			answer(nil, "", err)
			return
		}
		s.keepQEMU(p)
	}
	page, fd, method, err := loadModule(ctx, p, s.Module)
	// A main thread that is never idle doesn't answer a cont either: it still pins memory, or loads a state.
	for end := time.Now().Add(busyWait); s.mode() == control.Relay && errors.Is(err, attach.ErrBusy) && time.Now().Before(end) && s.qemuLives(); {
		s.domain.module.isBusy(err)
		time.Sleep(200 * time.Millisecond) // of a process that is stopped it is known at once
		again, cancel := context.WithTimeout(context.Background(), loadWait)
		page, fd, method, err = loadModule(again, p, s.Module)
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
