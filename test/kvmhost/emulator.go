package kvmhost

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// emulator is a QEMU that emulates hosts.
type emulator struct {
	program  string
	firmware []string // arguments that say where its firmware is
}

// sound is the first version of QEMU whose TCG locks a page of code while it translates it. Before it, a processor may go on with
// code that another one has just replaced, such as the breakpoints with which a kernel patches itself: the host hangs or crashes,
// the more often the more processors its guests have.
var sound = [2]int{8, 1}

// newEnough are packages of a QEMU for Debian 12, whose own is 7.2. It needs the libraries that 7.2 needs.
var newEnough = []string{"qemu-system-x86", "qemu-system-data", "seabios"}

const newEnoughSuite = "bookworm-backports"

var version = regexp.MustCompile(`version (\d+)\.(\d+)`)

// qemuVersion asks a QEMU.
func qemuVersion(program string) (v [2]int, err error) {
	out, err := exec.Command(program, "--version").Output()
	if err != nil {
		return v, err
	}
	found := version.FindSubmatch(out)
	if found == nil {
		return v, fmt.Errorf("%s --version printed %.80q", program, out)
	}
	v[0], _ = strconv.Atoi(string(found[1]))
	v[1], _ = strconv.Atoi(string(found[2]))
	return v, nil
}

func older(v, than [2]int) bool { return v[0] < than[0] || v[0] == than[0] && v[1] < than[1] }

// own is this machine's.
var own = &emulator{program: "qemu-system-x86_64"}

// ownVersion is that of this machine's QEMU, where it can emulate a host.
func ownVersion() (v [2]int, err error) {
	if v, err = qemuVersion(own.program); err != nil {
		return v, errors.New("an emulated host needs qemu-system-x86_64; fix: apt-get install qemu-system-x86")
	}
	// SVM with nested paging that a stock kernel takes, and sockets that are handed over: tried with 7.2.
	if v[0] < 7 {
		return v, fmt.Errorf("QEMU %d.%d is too old to emulate a KVM host; fix: QEMU 7.2 or later, as in Debian 12", v[0], v[1])
	}
	return v, nil
}

// findEmulator gives this machine's QEMU, or on Debian 12 a newer one, which is fetched, kept below dir and never installed. What
// runs in the host isn't changed by it. release is /etc/os-release's text.
func findEmulator(dir, release string) (*emulator, error) {
	v, err := ownVersion()
	if err != nil {
		return nil, err
	}
	if !older(v, sound) || !strings.Contains(release, "VERSION_CODENAME=bookworm\n") {
		return own, nil
	}
	newer, err := fetchEmulator(dir)
	if err != nil {
		say("QEMU %d.%d emulates hosts that crash now and then, and a newer one can't be had: %v", v[0], v[1], err)
		return own, nil
	}
	return newer, nil
}

// fetchEmulator gives the newer QEMU, which it fetches where it isn't there.
func fetchEmulator(dir string) (*emulator, error) {
	unlock, err := lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	home := filepath.Join(dir, "qemu")
	share := filepath.Join(home, "usr/share")
	e := &emulator{filepath.Join(home, "usr/bin/qemu-system-x86_64"), []string{"-L", filepath.Join(share, "qemu"), "-L", filepath.Join(share, "seabios")}}
	if _, err := os.Stat(home); err == nil {
		return e, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	say("fetching a newer QEMU to emulate the host, from %s (some 15 MB), once", newEnoughSuite)
	work := home + ".new"
	defer os.RemoveAll(work)
	tree, err := unpack(work, newEnoughSuite, func(*apt) ([]string, error) { return newEnough, nil })
	if err != nil {
		return nil, err
	}
	v, err := qemuVersion(filepath.Join(tree, "usr/bin/qemu-system-x86_64"))
	if err != nil {
		return nil, fmt.Errorf("QEMU of %s doesn't run here: %w", newEnoughSuite, err)
	}
	if older(v, sound) {
		return nil, fmt.Errorf("QEMU of %s is %d.%d", newEnoughSuite, v[0], v[1])
	}
	return e, os.Rename(tree, home)
}
