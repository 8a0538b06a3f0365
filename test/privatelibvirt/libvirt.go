package privatelibvirt

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// URI is where the private libvirt answers.
	URI = "qemu:///system"
	// LogPath is libvirtd's log.
	LogPath = "/var/log/libvirt/libvirtd.log"
	// Prefix is where Install puts programs. Everybody may read it.
	Prefix = Dir + "/usr"
	// HooksDir is where libvirt looks for hooks of the qemu driver.
	HooksDir = "/etc/libvirt/hooks/qemu.d"

	startTimeout = 2 * time.Minute
)

// daemon is a child of this process.
type daemon struct {
	cmd  *exec.Cmd
	dead chan struct{} // closed after it was reaped
}

var libvirtd *daemon

func launch(name string, args ...string) (*daemon, error) {
	path, err := program(name)
	if err != nil {
		return nil, err
	}
	if unconfined, err := exec.LookPath("aa-exec"); err == nil && appArmor() {
		// The machine's profiles know nothing of the places in here.
		args = append([]string{"-p", "unconfined", "--", path}, args...)
		path = unconfined
	}
	// The caller's standard output would stay open as long as the daemon.
	out, err := os.OpenFile("/var/log/"+name+".out", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	d := &daemon{cmd: exec.Command(path, args...), dead: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr, d.cmd.Dir = out, out, "/"
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.cmd.Wait()
		close(d.dead)
	}()
	return d, nil
}

func appArmor() bool {
	enabled, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return bytes.HasPrefix(enabled, []byte("Y"))
}

func runInner(inner func() int, o Options) (int, error) {
	config := map[string]string{
		// The first of two equal keys counts.
		"libvirtd.conf": o.LibvirtdConf + `
auth_unix_ro = "none"
auth_unix_rw = "none"
log_level = 3
log_outputs = "3:file:` + LogPath + `"
`,
		// No security driver but DAC: AppArmor profiles would be loaded into
		// the machine's kernel. No huge pages: libvirt would make a directory there.
		"qemu.conf": o.QemuConf + `
security_driver = "none"
hugetlbfs_mount = []
`,
	}
	for name, text := range config {
		if err := os.WriteFile("/etc/libvirt/"+name, []byte(text), 0o644); err != nil {
			return 0, err
		}
	}
	for _, dir := range []string{"/run/dbus", "/run/lock", "/var/log/libvirt/qemu", HooksDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return 0, err
		}
	}
	// The sticky bit as on any machine: lock files of others.
	if err := os.Chmod("/run/lock", 0o1777); err != nil {
		return 0, err
	}
	if o.Prepare != nil {
		if err := o.Prepare(); err != nil {
			return 0, fmt.Errorf("preparing: %w", err)
		}
	}
	for _, d := range [][]string{{"dbus-daemon", "--system", "--nofork", "--nopidfile"}, {"virtlogd"}} {
		if _, err := launch(d[0], d[1:]...); err != nil {
			return 0, fmt.Errorf("starting %s: %w", d[0], err)
		}
	}
	if err := Start(); err != nil {
		return 0, err
	}
	return inner(), nil
}

// Start starts libvirtd and waits until it answers. After Stop or Kill it
// finds the domains that still run.
func Start() error {
	if !Inside() {
		return errors.New("starting libvirtd: not inside the private libvirt")
	}
	if Running() {
		return errors.New("starting libvirtd: it runs already")
	}
	d, err := launch("libvirtd")
	if err != nil {
		return fmt.Errorf("starting libvirtd: %w", err)
	}
	libvirtd = d
	for end := time.Now().Add(startTimeout); ; time.Sleep(50 * time.Millisecond) {
		out, err := exec.Command("virsh", "-q", "-c", URI, "version").CombinedOutput()
		if err == nil {
			return nil
		}
		if !Running() || time.Now().After(end) {
			log, _ := os.ReadFile(LogPath)
			own, _ := os.ReadFile("/var/log/libvirtd.out")
			return fmt.Errorf("starting libvirtd: virsh version: %w: %s\nlibvirtd's log:\n%s%s",
				err, bytes.TrimSpace(out), tail(log, 20), tail(own, 20))
		}
	}
}

// Running tells whether libvirtd runs.
func Running() bool {
	if libvirtd == nil {
		return false
	}
	select {
	case <-libvirtd.dead:
		return false
	default:
		return true
	}
}

// PID is libvirtd's process.
func PID() int { return libvirtd.cmd.Process.Pid }

// Stop ends libvirtd as an upgrade of the package does. Domains keep running.
func Stop() error { return end(unix.SIGTERM) }

// Kill ends libvirtd as a crash does. Domains keep running.
func Kill() error { return end(unix.SIGKILL) }

func end(signal unix.Signal) error {
	if !Running() {
		return errors.New("stopping libvirtd: it does not run")
	}
	if err := libvirtd.cmd.Process.Signal(signal); err != nil {
		return fmt.Errorf("stopping libvirtd: %w", err)
	}
	select {
	case <-libvirtd.dead:
		return nil
	case <-time.After(startTimeout):
		return fmt.Errorf("stopping libvirtd: %v had no effect", signal)
	}
}

// Install installs a built tree from Options.Prepare: make install with the
// programs below Prefix and the hook in HooksDir. It builds nothing. Further
// variables for make are given as NAME=value.
func Install(repo string, variables ...string) error {
	if !Inside() {
		return errors.New("installing: not inside the private libvirt")
	}
	args := append([]string{"--no-print-directory", "-C", repo, "-o", "build", "install", "DESTDIR=", "PREFIX=" + Prefix, "SYSCONFDIR=/etc"}, variables...)
	if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("installing: make %s: %w\n%s", strings.Join(args, " "), err, tail(out, 30))
	}
	for _, path := range []string{
		filepath.Join(Prefix, "bin/ftclock"), filepath.Join(Prefix, "sbin/ftclock-hook"), filepath.Join(Prefix, "sbin/ftclock-shim"),
		filepath.Join(Prefix, "lib/ftclock/libftclock-qemu.so"), filepath.Join(HooksDir, "50-ftclock"),
	} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("installing: make left it out: %w", err)
		}
	}
	return nil
}

// Installed are the Options of a Main in whose private libvirt the whole of
// ftclock is installed from repo.
func Installed(repo string) Options {
	return Options{Prepare: func() error { return Install(repo) }}
}

// Virsh runs virsh as a person would and returns what it printed, both
// streams, with the error where it failed.
func Virsh(args ...string) (string, error) {
	if !Inside() {
		return "", errors.New("running virsh: not inside the private libvirt")
	}
	out, err := exec.Command("virsh", append([]string{"-c", URI}, args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

// Log returns the last lines of libvirtd's log and of that domain's QEMU.
func Log(domain string) string {
	daemon, _ := os.ReadFile(LogPath)
	qemu, _ := os.ReadFile("/var/log/libvirt/qemu/" + domain + ".log")
	return fmt.Sprintf("libvirtd:\n%sQEMU of %s:\n%s", tail(daemon, 20), domain, tail(qemu, 20))
}

func tail(text []byte, lines int) []byte {
	all := bytes.SplitAfter(text, []byte("\n"))
	return bytes.Join(all[max(0, len(all)-lines-1):], nil)
}
