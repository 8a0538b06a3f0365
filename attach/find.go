package attach

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

// FindQEMU finds a domain's QEMU by the pid file that libvirt keeps in the directory run, and proves by its command line that
// it is it. root is "/" but in tests.
func FindQEMU(root, run, name, uuid string) (int, error) {
	pid, err := findQEMU(root, run, name, uuid)
	if err != nil {
		return 0, fmt.Errorf("finding the QEMU of %s: %w", name, err)
	}
	return pid, nil
}

func findQEMU(root, run, name, uuid string) (int, error) {
	pid, err := host.ReadPID(host.PIDFile(filepath.Join(root, run), name))
	if err != nil {
		return 0, err
	}
	proc := filepath.Join(root, "proc", strconv.Itoa(pid))
	exe, err := os.Readlink(filepath.Join(proc, "exe"))
	if err != nil {
		return 0, err
	}
	if _, is := qemuProgram(exe); !is {
		return 0, fmt.Errorf("process %d is %s, not QEMU", pid, host.OneLine(exe))
	}
	cmdline, err := host.ReadText(filepath.Join(proc, "cmdline"))
	if err != nil {
		return 0, err
	}
	if !isQEMUOf(cmdline, name, uuid) {
		return 0, fmt.Errorf("process %d is the QEMU of another domain", pid)
	}
	return pid, nil
}

// qemuProgram gives the name of a program, as /proc/PID/exe links to it, and says whether it is one of QEMU's. An upgrade of
// its package deletes the file of a QEMU that runs.
func qemuProgram(exe string) (name string, is bool) {
	name = filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	return name, strings.Contains(name, "qemu") || name == "kvm"
}

// IsQEMU says whether the program of process pid is called like one of QEMU's, whoever runs it. proc is "/proc" but in tests. The
// error wraps ErrGone or ErrRefused.
func IsQEMU(proc string, pid int) (bool, error) {
	exe, err := os.Readlink(filepath.Join(proc, strconv.Itoa(pid), "exe"))
	if err != nil {
		return false, procError(err) // a thread of the kernel has none, and is gone for us, too
	}
	_, is := qemuProgram(exe)
	return is, nil
}

// Guest reads what the QEMU of process pid calls its guest: "" for what its command line doesn't name. uuid is as libvirt writes it,
// if it is one. Both are what the process says of itself. proc is "/proc" but in tests.
func Guest(proc string, pid int) (name, uuid string, err error) {
	cmdline, err := host.ReadText(filepath.Join(proc, strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return "", "", err
	}
	name, uuid = parseGuest(cmdline)
	return name, uuid, nil
}

// parseGuest is Guest of a command line, as /proc/PID/cmdline has it.
func parseGuest(cmdline []byte) (name, uuid string) {
	args := strings.Split(string(cmdline), "\x00")
	for i, arg := range args[:len(args)-1] {
		switch option, is := strings.CutPrefix(arg, "-"); {
		case is && (option == "name" || option == "-name"):
			name = guestName(args[i+1])
		case is && (option == "uuid" || option == "-uuid"):
			uuid = args[i+1]
			if id, ok := host.UUID(uuid); ok {
				uuid = id
			}
		}
	}
	return name, uuid
}

// guestName is the guest's name of qemu(1)'s -name: a list of options, of which the first may lack its name. A comma in one is doubled.
func guestName(options string) string {
	const comma = "\x00"
	for i, option := range strings.Split(strings.ReplaceAll(options, ",,", comma), ",") {
		if name, is := strings.CutPrefix(option, "guest="); is || i == 0 && !strings.Contains(option, "=") {
			return strings.ReplaceAll(name, comma, ",")
		}
	}
	return ""
}

// isQEMUOf tells whether a QEMU's command line, as libvirt writes it, is for this domain.
func isQEMUOf(cmdline []byte, name, uuid string) bool {
	called, id := parseGuest(cmdline)
	return id == uuid && id != "" || id == "" && called == name && name != ""
}

// FindListening finds the QEMU that listens on the unix socket that was bound to path, by the pid in pidFile. It waits for both
// until ctx ends. The peer of a connection to it can't tell: the kernel names the process that bound the socket, libvirtd. So
// the pid in the file is proven by the socket's inode among the process's descriptors. pidfd is the caller's: until it says that
// the process has ended, pid belongs to no other. The error wraps ErrRefused where the process can't be looked at.
func FindListening(ctx context.Context, pidFile, path string) (pid, pidfd int, err error) {
	for ; ; time.Sleep(20 * time.Millisecond) {
		if pid, pidfd, err = listening(pidFile, path); err == nil {
			return pid, pidfd, nil
		}
		if ctx.Err() != nil || errors.Is(err, ErrRefused) {
			return 0, -1, fmt.Errorf("finding QEMU: %w", err)
		}
	}
}

func listening(pidFile, path string) (pid, pidfd int, err error) {
	pid, err = host.ReadPID(pidFile)
	if err != nil {
		return 0, -1, err
	}
	if pidfd, err = host.OpenProcess(pid); err != nil {
		return 0, -1, err
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
		_ = unix.Close(pidfd)
		return 0, -1, err
	}
	return pid, pidfd, nil
}

// Listens says whether any process listens on the unix socket that was bound to path.
func Listens(path string) bool {
	inodes, err := listeners(path)
	return err == nil && len(inodes) > 0
}

// listeners gives the listening unix sockets that were bound to path, as links of /proc/PID/fd have them (proc(5),
// /proc/net/unix).
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

// holdsSocket says whether a process has one of these sockets open. A descriptor that is gone meanwhile is no error, nor is a
// process.
func holdsSocket(pid int, inodes map[string]bool) (bool, error) {
	dir := procPath(pid, "fd")
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
		return false, fmt.Errorf("looking at process %d: %w: CAP_SYS_PTRACE is missing, or a security module says no", pid, ErrRefused)
	}
	return false, nil
}
