package host

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// sizeSeals keep a memory file's size, and these seals, as they are.
const sizeSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// MemoryFile makes a memory file that isn't sealed yet, and closed in programs that this one executes: memfd_create(2). The
// name shows in /proc/PID/fd. The descriptor is the caller's.
func MemoryFile(name string) (fd int, err error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	// Where vm.memfd_noexec is 2 the flag is a must. Kernels before 6.3 don't know it.
	fd, err = unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	return fd, nil
}

// SizedFile makes a memory file of so many zero bytes. It can be written to, and mapped without fear of SIGBUS: nobody who gets
// it can change its size.
func SizedFile(name string, size int64) (fd int, err error) {
	return sealed(name, sizeSeals, func(fd int) error { return os.NewSyscallError("ftruncate", unix.Ftruncate(fd, size)) })
}

// ConstantFile makes a memory file of this content. Nobody who gets it can change it.
func ConstantFile(name string, content []byte) (fd int, err error) {
	return sealed(name, sizeSeals|unix.F_SEAL_WRITE, func(fd int) error {
		for rest := content; len(rest) > 0; {
			n, err := unix.Write(fd, rest)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return os.NewSyscallError("write", err)
			}
			rest = rest[max(n, 0):]
		}
		return nil
	})
}

func sealed(name string, seals int, fill func(fd int) error) (fd int, err error) {
	if fd, err = MemoryFile(name); err != nil {
		return -1, err
	}
	if err = fill(fd); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
		err = os.NewSyscallError("fcntl", err)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
