package attach

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

// procLimit bounds what is read of one file in /proc/PID, in bytes. The memory map of a large QEMU has about 1 MB.
const procLimit = 16 << 20

func procPath(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

// procError puts what /proc answers for a process that is gone, or that we may not look at, into our own terms.
func procError(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		return ErrGone
	case errors.Is(err, os.ErrPermission):
		return refused()
	}
	return err
}

// refused names what can be the reason for EPERM and EACCES on another process, in the order of ptrace(2), "Ptrace
// access mode checking".
func refused() error {
	scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err == nil && strings.TrimSpace(string(scope)) == "3" {
		return fmt.Errorf("%w: kernel.yama.ptrace_scope is 3, which forbids it to everybody until the next boot", ErrRefused)
	}
	if self, err := readStatus(os.Getpid()); err == nil && self.caps&(1<<unix.CAP_SYS_PTRACE) == 0 {
		return fmt.Errorf("%w: this process lacks CAP_SYS_PTRACE", ErrRefused)
	}
	modules, err := os.ReadFile("/sys/kernel/security/lsm")
	if err != nil || len(modules) == 0 {
		modules = []byte("unknown")
	}
	return fmt.Errorf("%w: a security module may forbid it (active: %s), or the process is in another user namespace",
		ErrRefused, host.OneLine(string(modules)))
}

func readProc(pid int, name string) ([]byte, error) {
	f, err := os.Open(procPath(pid, name))
	if err != nil {
		return nil, procError(err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, procLimit))
	if err != nil {
		return nil, procError(err)
	}
	return content, nil
}

// status is what we need of /proc/PID/status: proc_pid_status(5).
type status struct {
	state       byte
	tracer      int
	uid, gid    uint32 // those that the file system asks for
	groups      []uint32
	caps        uint64 // effective
	shadowStack bool
}

func readStatus(pid int) (status, error) {
	content, err := readProc(pid, "status")
	if err != nil {
		return status{}, err
	}
	return parseStatus(content), nil
}

func parseStatus(content []byte) status {
	var s status
	id := func(value string) uint32 {
		n, _ := strconv.ParseUint(value, 10, 32)
		return uint32(n)
	}
	for line := range strings.Lines(string(content)) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		switch key {
		case "State":
			s.state = fields[0][0]
		case "TracerPid":
			s.tracer, _ = strconv.Atoi(fields[0])
		case "Uid":
			s.uid = id(fields[len(fields)-1])
		case "Gid":
			s.gid = id(fields[len(fields)-1])
		case "Groups":
			for _, field := range fields {
				s.groups = append(s.groups, id(field))
			}
		case "CapEff":
			s.caps, _ = strconv.ParseUint(fields[0], 16, 64)
		case "x86_Thread_features":
			s.shadowStack = slices.Contains(fields, "shstk")
		}
	}
	return s
}

// serves says whether a process in this state can be attached to.
func (s status) serves() error {
	switch {
	case s.state == 'Z' || s.state == 'X':
		return fmt.Errorf("%w: it has ended and waits for its parent (zombie)", ErrGone)
	case s.tracer != 0:
		return tracedBy(s.tracer)
	case s.state == 'T' || s.state == 't':
		return fmt.Errorf("%w: the process is stopped (SIGSTOP?); SIGCONT continues it", ErrBusy)
	case s.shadowStack:
		return ErrShadowStack
	}
	return nil
}

func tracedBy(tracer int) error {
	comm, err := readProc(tracer, "comm")
	if err != nil {
		comm = []byte("?")
	}
	return fmt.Errorf("%w by process %d (%s)", ErrTraced, tracer, host.OneLine(string(comm)))
}

// may says whether the process may use a file with these permissions: bit 4 to read, 1 to search. ACLs are not looked
// at.
func (s status) may(st *syscall.Stat_t, bit uint32) bool {
	const override = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH
	mode := st.Mode
	switch {
	case s.caps&override != 0:
		return true
	case s.uid == st.Uid:
		mode >>= 6
	case s.gid == st.Gid || slices.Contains(s.groups, st.Gid):
		mode >>= 3
	}
	return mode&bit != 0
}

// readStat reads what tells one use of a pid from the next.
func readStat(pid int) (host.Stat, error) {
	stat, err := host.ReadStat(pid)
	if err != nil {
		return host.Stat{}, procError(err)
	}
	return stat, nil
}

// mapping is one line of /proc/PID/maps: proc_pid_maps(5).
type mapping struct {
	start, end, offset uint64
	perms, dev, path   string
	inode              uint64
}

func readMaps(pid int) ([]mapping, error) {
	content, err := readProc(pid, "maps")
	if err != nil {
		return nil, err
	}
	return parseMaps(content), nil
}

// parseMaps leaves out lines that it doesn't understand.
func parseMaps(content []byte) []mapping {
	var maps []mapping
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), " ", 6)
		if len(fields) < 6 {
			continue
		}
		low, high, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(low, 16, 64)
		end, err2 := strconv.ParseUint(high, 16, 64)
		offset, err3 := strconv.ParseUint(fields[2], 16, 64)
		inode, err4 := strconv.ParseUint(fields[4], 10, 64)
		if errors.Join(err1, err2, err3, err4) != nil || start >= end || end > userEnd {
			continue
		}
		maps = append(maps, mapping{
			start: start, end: end, offset: offset, inode: inode,
			perms: fields[1], dev: fields[3], path: strings.TrimLeft(fields[5], " "),
		})
	}
	return maps
}

// userEnd is where the addresses of programs end with four levels of page tables. QEMU gets none above unless it asks.
const userEnd = 1 << 47

// codeAt returns the address at which the code at offset of a file is mapped; file is any mapping of it.
func codeAt(maps []mapping, file mapping, offset uint64) (uint64, bool) {
	for _, m := range maps {
		if m.path == file.path && m.inode == file.inode && strings.HasPrefix(m.perms, "r-xp") &&
			offset >= m.offset && offset-m.offset < m.end-m.start {
			return m.start + (offset - m.offset), true
		}
	}
	return 0, false
}

// openMapped opens the file behind a mapping: by the mapping itself, which finds a file that an upgrade has replaced
// but needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, else by its name, if that is still the same file.
func openMapped(pid int, m mapping) (*os.File, error) {
	f, err := os.Open(procPath(pid, fmt.Sprintf("map_files/%x-%x", m.start, m.end)))
	if err == nil {
		return f, nil
	}
	f, err = os.OpenFile(procPath(pid, "root"+m.path), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s of process %d: %w", host.OneLine(m.path), pid, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, os.NewSyscallError("fstat", err)
	}
	if dev := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev)); dev != m.dev || st.Ino != m.inode {
		f.Close()
		return nil, fmt.Errorf("opening %s of process %d: it has been replaced since, and /proc/%d/map_files can't be read",
			host.OneLine(m.path), pid, pid)
	}
	return f, nil
}

// resolve follows path the way the process does, in its own mount namespace and root, and checks that it may. It
// returns where the regular file at its end is found from here. path_resolution(7)
func resolve(pid int, path string, s status) (string, error) {
	if !filepath.IsAbs(path) || len(path) >= unix.PathMax || strings.ContainsRune(path, 0) {
		return "", fmt.Errorf("the library's path %q is not an absolute path of less than %d bytes", path, unix.PathMax)
	}
	root := procPath(pid, "root")
	const maxLinks = 40
	links := 0
	at := ""
	rest := strings.Split(path, "/")
	for i := 0; i < len(rest); i++ {
		last := i == len(rest)-1
		next := at + "/" + rest[i]
		switch rest[i] {
		case "", ".":
			next = at
		case "..":
			next = at[:max(strings.LastIndexByte(at, '/'), 0)]
		}
		info, err := os.Lstat(root + next)
		if next == "" {
			info, err = os.Stat(root + "/")
		}
		if errors.Is(err, os.ErrPermission) {
			return "", refused()
		}
		if err != nil {
			return "", fmt.Errorf("the library %s can't be found by the process: %s: %w", path, next, errno(err))
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return "", fmt.Errorf("the library %s can't be examined", path)
		}
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(root + next)
			if links++; err != nil || links > maxLinks {
				return "", fmt.Errorf("the library %s can't be found by the process: %s: bad symbolic link", path, next)
			}
			if filepath.IsAbs(target) {
				at = ""
			}
			rest = append(strings.Split(target, "/"), rest[i+1:]...)
			i = -1
			continue
		case last && !info.Mode().IsRegular():
			return "", fmt.Errorf("the library %s is not a regular file", path)
		case last && !s.may(st, 4):
			return "", fmt.Errorf("the library %s can't be read by the process (uid %d, gid %d): its mode is %v",
				path, s.uid, s.gid, info.Mode())
		case !last && !info.IsDir():
			return "", fmt.Errorf("the library %s can't be found by the process: %s is not a directory", path, next)
		case !last && !s.may(st, 1):
			return "", fmt.Errorf("the library %s can't be reached by the process (uid %d, gid %d): the mode of %s is %v",
				path, s.uid, s.gid, next, info.Mode())
		}
		at = next
	}
	return root + at, nil
}

// errno drops the path that the os package puts before an error: it is ours, not the one that the reader knows.
func errno(err error) error {
	var number syscall.Errno
	if errors.As(err, &number) {
		return number
	}
	return err
}
