// Package built has what tests run besides ftclock itself: guests, libraries that stand in for something, programs of
// another version. `make built` compiles all of it into build/test. Nothing is compiled while a test runs, so that
// tests run where a compiler is slow, as in the emulated host of package kvmhost.
package built

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// What there is. The Makefile says what each is built from.
const (
	Guest        = "guest.elf"     // the kvmclock guest, see package guest
	LinuxInit    = "init"          // of the Linux guest, see package linuxguest
	FakeClock    = "fakeclock.so"  // a host whose clock is disciplined, for one process
	Downtime     = "downtime.so"   // a QEMU that accounts for downtime itself
	Realtime     = "realtime.so"   // a QEMU that writes with KVM_CLOCK_REALTIME
	Busy         = "busy.so"       // a QEMU whose main thread is busy for a while
	Instructions = "cont"          // the module's path in a simulated host, to be counted
	ModuleOlder  = "module-1.1.so" // the module with an older minor version of the clock page
	ModuleNext   = "module-2.0.so" // the module with another major version
	ShimOne      = "shim-one"      // the shim, its version being "one"
	ShimTwo      = "shim-two"

	// For the loader, see attach/testdata: a program that does what QEMU does with its main thread, bound eagerly, lazily and
	// statically, and for another C library, and what is loaded into it.
	Target       = "target"
	TargetLazy   = "target-lazy"
	TargetStatic = "target-static"
	TargetMusl   = "target-musl"
	TargetModule = "target-module.so"
	TargetStops  = "target-stops.so" // stops its process when it is loaded

	// For the module, see qemu-plugin/testdata: a program that does what QEMU does with its clock, linked in different ways.
	FakeHardened    = "qemu-fake-hardened" // as distributions link QEMU
	FakeNoPLT       = "qemu-fake-noplt"    // calls through the GOT
	FakeLazy        = "qemu-fake-lazy"     // lazy binding
	FakeLazyNoRELRO = "qemu-fake-norelro"
	FakeFixed       = "qemu-fake-fixed" // at a fixed address
	FakeStranger    = "fake"            // as FakeHardened, but its name isn't one of QEMU's
	FakeNoIOCTL     = "qemu-noioctl"    // never calls ioctl
)

// Root is the repository's root: the next directory with a go.mod from the one upwards in which the program began.
func Root() (string, error) { return root() }

var began, errBegan = os.Getwd()

var root = sync.OnceValues(func() (string, error) {
	if errBegan != nil {
		return "", errBegan
	}
	for dir := began; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding ftclock's repository: %s is not in it", began)
		}
	}
})

// Path is where one of the constants, or another file below build/test, is.
func Path(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "build/test", name)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s has not been built; fix: run make built in the repository's root", path)
	} else if err != nil {
		return "", err
	}
	return path, nil
}

// Copy copies one of the constants into dir, readable by everybody, and gives its path there.
func Copy(name, dir string) (string, error) {
	path, err := Path(name)
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	copied := filepath.Join(dir, filepath.Base(name))
	if err := os.WriteFile(copied, text, 0o755); err != nil {
		return "", err
	}
	return copied, os.Chmod(copied, 0o755) // whatever the umask
}
