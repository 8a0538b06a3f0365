package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

// A process in another mount namespace doesn't see our files, and may have a file of its own where we have the library. So it
// is given the library in a memory file: it makes one, we fill and seal that, it loads it by its own /proc/self/fd, and closes it.

const (
	// memoryName is the memory file's name, as /proc/PID/maps shows it.
	memoryName = "ftclock-module"
	// memoryRoom is for the path that replaces the name, in bytes.
	memoryRoom = 32
	memoryLink = "/memfd:" + memoryName + " (deleted)"

	memorySeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL
)

// memoryFunctions are what is called of the C library for that, beside dlFunctions.
var memoryFunctions = []string{"memfd_create", "close", "__errno_location"}

// seesProc refuses a process that couldn't open its own descriptor by name.
func seesProc(pid int) error {
	var fs unix.Statfs_t
	err := unix.Statfs(procPath(pid, "root/proc"), &fs)
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return refused()
	case err != nil || fs.Type != unix.PROC_SUPER_MAGIC:
		return fmt.Errorf("%w: the process has no /proc where it runs, through which it would open the module", ErrNoSlot)
	}
	return nil
}

// loadIn has the stopped thread load the library.
func (s *subject) loadIn(t *tracee, found *unix.PtraceRegs, old *saved, f *frame) error {
	if s.local != "" {
		return s.dlopenIn(t, found, old, f)
	}
	fd, err := s.memoryIn(t, found, old, f)
	if err != nil {
		return err
	}
	err = s.fill(fd)
	if err == nil {
		_, err = s.mem.WriteAt(append(fmt.Appendf(nil, "/proc/self/fd/%d", fd), 0), int64(f.path))
		if err != nil {
			err = memoryError("writing the path", err)
		}
	}
	if err == nil {
		err = s.again(t, func(now *unix.PtraceRegs) error { return s.dlopenIn(t, now, old, f) })
	}
	if errors.Is(err, ErrGone) || t.underway {
		return err
	}
	return also(err, s.again(t, func(now *unix.PtraceRegs) error {
		_, err := s.run(t, now, old, f, "close", uint64(fd), 0)
		return err
	}))
}

// again calls f with the registers that the thread has now.
func (s *subject) again(t *tracee, f func(now *unix.PtraceRegs) error) error {
	now, err := t.registers()
	if err != nil {
		return err
	}
	return f(&now)
}

// memoryIn has the thread make a memory file, and gives its number there.
func (s *subject) memoryIn(t *tracee, found *unix.PtraceRegs, old *saved, f *frame) (fd int, err error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	now := *found
	// Where vm.memfd_noexec is 1 the flag is a must. Kernels before 6.3 don't know it.
	for _, exec := range []uint64{unix.MFD_EXEC, 0} {
		result, err := s.run(t, &now, old, f, "memfd_create", f.path, flags|exec)
		if err != nil {
			return -1, err
		}
		if int32(result) >= 0 {
			return int(int32(result)), nil
		}
		if now, err = t.registers(); err != nil {
			return -1, err
		}
	}
	at, err := s.run(t, &now, old, f, "__errno_location", 0, 0)
	if err != nil {
		return -1, err
	}
	var number [4]byte
	if _, err := s.mem.ReadAt(number[:], int64(at)); err != nil {
		return -1, memoryError("reading errno", err)
	}
	return -1, fmt.Errorf("%w: the process can't make a memory file for the module: %w (is vm.memfd_noexec 2, or is it confined?)",
		ErrDlopen, unix.Errno(binary.LittleEndian.Uint32(number[:])))
}

// fill writes the library to the process's memory file fd, and seals it.
func (s *subject) fill(fd int) error {
	path := procPath(s.pid, "fd/"+strconv.Itoa(fd))
	// Other threads of the process run: they may have closed it, and opened something else.
	if link, err := os.Readlink(path); err != nil || link != memoryLink {
		return fmt.Errorf("filling the memory file %d: the process has %s there (%v)", fd, host.OneLine(link), err)
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("filling the memory file %d: %w", fd, errno(err))
	}
	defer file.Close()
	if !fresh(file) {
		return fmt.Errorf("filling the memory file %d: it is another file by now", fd)
	}
	if _, err = file.WriteAt(s.image, 0); err == nil {
		_, err = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, memorySeals)
	}
	if err != nil {
		return fmt.Errorf("filling the memory file %d: %w", fd, errno(err))
	}
	return nil
}

// fresh says whether a file is a memory file that can still be sealed. We may write to files that the process may only read, so that
// none of a file system's may be taken for it: those of a tmpfs, as /run is one, have the seal of the seals.
func fresh(file *os.File) bool {
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	return err == nil && seals&^unix.F_SEAL_EXEC == 0 // which a memory file may be made with
}
