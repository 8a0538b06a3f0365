package container

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The suites that are tested: the names that debootstrap has for them.
const (
	Debian12 = "bookworm"
	Debian13 = "trixie"
)

// Suite is the one that a test boots: FTCLOCK_SUITE, or else Debian 12.
func Suite() string { return cmp.Or(os.Getenv("FTCLOCK_SUITE"), Debian12) }

// mirror is where packages come from unless FTCLOCK_DEBIAN_MIRROR names another place.
const mirror = "http://deb.debian.org/debian"

// Packages are in every image, with what they depend on.
var Packages = []string{
	"systemd-sysv", "dbus", "libpam-systemd", "systemd-container", "ca-certificates",
	"libvirt-daemon-system", "libvirt-clients", "qemu-system-x86",
}

// Missing says what this machine lacks for containers, one line each, with the fix.
func Missing() []string {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "not root; fix: run as root (sudo -E make test)")
	}
	for _, p := range []struct{ program, name string }{{"debootstrap", "debootstrap"}, {"systemd-nspawn", "systemd-container"}, {"nsenter", "util-linux"}} {
		if _, err := program(p.program); err != nil {
			missing = append(missing, fmt.Sprintf("%s is not installed; fix: apt-get install %s", p.program, p.name))
		}
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		missing = append(missing, "no /dev/kvm; fix: run it on an emulated host by make test, or modprobe kvm_intel or kvm_amd")
	}
	return missing
}

// kept are the files of those packages that stay in the image's cache, to be installed once more: the mirror drops a version when
// it has a newer one.
var kept = []string{"libvirt", "qemu-system-"}

// program finds a system program, also where PATH lacks the sbin directories.
func program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath("/usr/sbin/" + name)
}

// Image gives the directory of a suite's tree, and makes it if it isn't there: a minute and 600 MB, in FTCLOCK_IMAGES or
// the user's cache. Nobody may write to it. It has Packages and the further ones.
func Image(suite string, further ...string) (string, error) {
	packages := append(append([]string(nil), Packages...), further...)
	cache := os.Getenv("FTCLOCK_IMAGES")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			user = "/var/tmp" // no home, as in some builders
		}
		cache = filepath.Join(user, "ftclock-images")
	}
	sum := sha256.Sum256([]byte(strings.Join(packages, " ") + ", with the files of " + strings.Join(kept, " ")))
	image := filepath.Join(cache, suite+"-"+hex.EncodeToString(sum[:4]))
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("making the %s image: %w", suite, err)
	}
	// Packages' tests run at the same time as each other; one of them makes the image.
	lock, err := os.OpenFile(image+".lock", os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return "", fmt.Errorf("making the %s image: %w", suite, err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("making the %s image: %w", suite, os.NewSyscallError("flock", err))
	}
	if _, err := os.Stat(image); err == nil {
		return image, nil
	}
	next := image + ".new"
	if err := os.RemoveAll(next); err != nil {
		return "", fmt.Errorf("making the %s image: %w", suite, err)
	}
	if err := build(suite, next, packages); err != nil {
		return "", fmt.Errorf("making the %s image: %w", suite, err)
	}
	return image, os.Rename(next, image)
}

func build(suite, dir string, packages []string) error {
	from := os.Getenv("FTCLOCK_DEBIAN_MIRROR")
	if from == "" {
		from = mirror
	}
	debootstrap, err := program("debootstrap")
	if err != nil {
		return err
	}
	if err := run(exec.Command(debootstrap, "--variant=minbase", suite, dir, from)); err != nil {
		return err
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return err
	}
	// Services must not start in a chroot; the machine's resolver finds the mirror.
	policy := filepath.Join(dir, "usr/sbin/policy-rc.d")
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "etc/resolv.conf"), resolv, 0o644),
		os.WriteFile(policy, []byte("#!/bin/sh\nexit 101\n"), 0o755),
	)
	if err != nil {
		return err
	}
	install := exec.Command("chroot", append([]string{dir, "apt-get", "install", "-y", "-q", "--no-install-recommends",
		"-o", "APT::Sandbox::User=root", "-o", "Dpkg::Options::=--force-unsafe-io"}, packages...)...)
	install.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	if err := run(install); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(dir, "var/cache/apt/archives/*.deb"))
	for _, deb := range debs {
		if !slices.ContainsFunc(kept, func(k string) bool { return strings.HasPrefix(filepath.Base(deb), k) }) {
			err = errors.Join(err, os.Remove(deb))
		}
	}
	return errors.Join(err, os.Remove(policy))
}

// run runs a command that takes long, and gives its last words where it fails.
func run(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out[max(0, len(out)-2000):])
	}
	return nil
}
