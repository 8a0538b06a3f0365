package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"

	"ftclock/test/built"

	"golang.org/x/sys/unix"
)

// Missing says what this machine lacks for a private libvirt, one line each,
// with the fix. Nothing missing means that Main can run.
func Missing() []string {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "not root; fix: run as root (sudo -E make test)")
	}
	packages := []struct{ program, name string }{
		{"libvirtd", "libvirt-daemon-system"},
		{"virtlogd", "libvirt-daemon-system"},
		{"virsh", "libvirt-clients"},
		{"qemu-system-x86_64", "qemu-system-x86"},
		{"dbus-daemon", "dbus"},
	}
	for _, p := range packages {
		if _, err := program(p.program); err != nil {
			missing = append(missing, fmt.Sprintf("%s is not installed; fix: apt-get install %s", p.program, p.name))
		}
	}
	if kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(kvm)
	} else if errors.Is(err, unix.ENOENT) {
		missing = append(missing, "no /dev/kvm; fix: run it on an emulated host by make test or make shell, or modprobe kvm_intel or kvm_amd")
	} else if os.Geteuid() == 0 {
		missing = append(missing, fmt.Sprintf("/dev/kvm can't be opened: %v; fix: switch on virtualization in the firmware, or let the container use the device", err))
	}
	if _, err := groupID("kvm"); err != nil {
		missing = append(missing, "no group kvm; fix: apt-get install qemu-system-x86 (or groupadd --system kvm)")
	}
	return missing
}

// MissingFor says in one line why a program that `make NAME` runs from within
// the repository can't run here, with the fix, or is empty.
func MissingFor(name string) string {
	if os.Geteuid() != 0 {
		return "not root; fix: sudo -E make " + name
	}
	if _, err := built.Root(); err != nil {
		return err.Error() + "; fix: run make " + name + " in its root"
	}
	return strings.Join(Missing(), "; ")
}

// Required tells whether a test that can't run must fail: FTCLOCK_REQUIRE=1
// says so, and CI=true does where the machine has /dev/kvm.
func Required() bool {
	if os.Getenv("FTCLOCK_REQUIRE") == "1" {
		return true
	}
	_, err := os.Stat("/dev/kvm")
	return os.Getenv("CI") == "true" && err == nil
}

// LeaveOut skips a test for the reason, which names the fix, or fails it where
// Required.
func LeaveOut(t interface {
	Helper()
	Skip(...any)
	Fatal(...any)
}, reason string) {
	t.Helper()
	if Required() {
		t.Fatal("left out:", reason)
	}
	t.Skip("left out:", reason)
}

// program finds a system program, also where PATH lacks the sbin directories.
func program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath("/usr/sbin/" + name)
}

func groupID(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}
