// Needed by: the clock page. Shim and QEMU map the same memfd; were one of
// them, taken over, able to shorten it, the other would die of SIGBUS.

package kernel

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSealedMemfdKeepsItsSize(t *testing.T) {
	fd, err := unix.MemfdCreate("ftclock-page", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(os.NewSyscallError("memfd_create", err))
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(os.NewSyscallError("ftruncate", err))
	}
	mine, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(os.NewSyscallError("mmap", err))
	}
	defer unix.Munmap(mine)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		t.Fatal(os.NewSyscallError("fcntl", err))
	}

	// As the other side gets at it.
	other, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(os.NewSyscallError("open", err))
	}
	defer unix.Close(other)
	for _, f := range []int{fd, other} {
		for _, size := range []int64{0, 8192} {
			if err := unix.Ftruncate(f, size); err != unix.EPERM {
				t.Errorf("ftruncate to %d: %v", size, err)
			}
		}
		if _, err := unix.FcntlInt(uintptr(f), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != unix.EPERM {
			t.Errorf("another seal: %v", err)
		}
		seals, err := unix.FcntlInt(uintptr(f), unix.F_GET_SEALS, 0)
		if err != nil || seals != unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL {
			t.Errorf("seals %#x: %v", seals, err)
		}
	}
	theirs, err := unix.Mmap(other, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(os.NewSyscallError("mmap", err))
	}
	defer unix.Munmap(theirs)
	mine[100] = 42
	if theirs[100] != 42 {
		t.Error("the mappings differ")
	}
	// What stays possible only empties the page.
	if err := unix.Fallocate(other, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err != nil {
		t.Logf("punching a hole: %v", err)
	} else if mine[100] != 0 {
		t.Error("a punched page keeps its content")
	}
}
