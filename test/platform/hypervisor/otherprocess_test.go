// Needed by: the module's very existence. KVM takes ioctls on a VM from the
// process that made it alone (kvm->mm != current->mm in the kernel's
// virt/kvm/kvm_main.c): the clock can be corrected from inside QEMU only.

package hypervisor

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"unsafe"

	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

func TestKVMOtherProcessGetsEIO(t *testing.T) {
	pid, _ := startQEMU(t)
	links := check.Value(filepath.Glob("/proc/" + strconv.Itoa(pid) + "/fd/*"))(t)
	machine := -1
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && to == "anon_inode:kvm-vm" {
			machine, _ = strconv.Atoi(filepath.Base(link))
		}
	}
	if machine < 0 {
		t.Fatal("QEMU has no KVM machine open")
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	must(t, "pidfd_open", pidfd, err)
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, machine, 0)
	must(t, "pidfd_getfd", fd, err)
	defer unix.Close(fd)
	for name, request := range map[string]uintptr{"KVM_GET_CLOCK": kvmGetClock, "KVM_SET_CLOCK": kvmSetClock} {
		var c kvmClockData
		if _, err := ioctl(fd, request, unsafe.Pointer(&c)); err != unix.EIO {
			t.Errorf("%s from another process: %v", name, err)
		}
	}
}
