package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"ftclock/test/kvmhost"
	"ftclock/test/kvmhost/protocol"

	"golang.org/x/sys/unix"
)

// Dir is a directory on the private tmpfs, mode 0755, for whatever QEMU's
// user must reach: guests, sockets, an installation.
const Dir = "/run/ftclock-test"

// passInterrupt is how the outer stage hands an interrupt that didn't come from
// the keyboard through process 1, which can't see the terminal's process group.
const passInterrupt = unix.SIGUSR1

const stageVariable = "FTCLOCK_PRIVATE_LIBVIRT_STAGE"

// stage is read once: the variable must not reach the programs that a test starts.
var stage = func() string {
	s := os.Getenv(stageVariable)
	os.Unsetenv(stageVariable)
	return s
}()

// Options are what a private libvirt can differ in.
type Options struct {
	// QemuConf are lines for qemu.conf. They win over the package's own.
	QemuConf string
	// LibvirtdConf are lines for libvirtd.conf. They win over the package's own.
	LibvirtdConf string
	// Prepare runs inside, before libvirtd starts for the first time: libvirt
	// looks for hooks at its start only.
	Prepare func() error
}

// Main calls inner inside a private libvirt and returns its exit code, for
// os.Exit. It starts the program again, so that whatever comes before Main in
// the program's main or TestMain happens three times. Where the machine lacks
// something, it says what on standard error, with the fix, doesn't call inner
// and returns 0, or 1 where Required.
func Main(inner func() int, o Options) int {
	switch stage {
	case "":
		return outer()
	case "init":
		return initialize()
	default:
		code, err := runInner(inner, o)
		if err != nil {
			fmt.Fprintln(os.Stderr, "private libvirt:", err)
			return 1
		}
		return code
	}
}

func outer() int {
	if missing := Missing(); len(missing) > 0 {
		what := "LEFT OUT"
		if Required() {
			what = "FAILED"
		}
		for _, m := range missing {
			fmt.Fprintf(os.Stderr, "%s: everything in %s: %s\n", what, filepath.Base(os.Args[0]), m)
		}
		if Required() {
			return 1
		}
		return 0
	}
	// The death signal comes when the creating thread ends, not the process.
	runtime.LockOSThread()
	cmd := again("init")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
		Pdeathsig:  unix.SIGKILL,
	}
	return supervise(cmd)
}

// again is a command that runs this program once more, as the given stage.
func again(stage string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageVariable+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

// supervise starts cmd, passes signals on and returns its exit code. An
// interrupt from the keyboard reaches the whole process group by itself.
func supervise(cmd *exec.Cmd) int {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "private libvirt: starting its namespaces:", err)
		return 1
	}
	go func() {
		for s := range signals {
			if s == unix.SIGINT {
				if inForeground() {
					continue
				}
				s = passInterrupt
			}
			cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &exit):
		fmt.Fprintln(os.Stderr, "private libvirt:", err)
		return 1
	default:
		return protocol.ExitCode(exit.Sys().(syscall.WaitStatus))
	}
}

// inForeground tells whether the terminal's keyboard signals come to this process group.
func inForeground() bool {
	tty, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(tty)
	group, err := unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// initialize is process 1: it makes the private file systems, starts the
// inner stage and reaps.
func initialize() int {
	if os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "private libvirt: %s is set, but this is not process 1\n", stageVariable)
		return 1
	}
	if err := privateFileSystems(); err != nil {
		fmt.Fprintln(os.Stderr, "private libvirt:", err)
		return 1
	}
	if err := loopbackUp(); err != nil {
		fmt.Fprintln(os.Stderr, "private libvirt: loopback interface:", err)
		return 1
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, passInterrupt)
	cmd := again("inner")
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "private libvirt: starting the inner stage:", err)
		return 1
	}
	go func() {
		for s := range signals {
			switch s {
			case unix.SIGINT: // the keyboard's; the inner stage has it too
			case passInterrupt:
				cmd.Process.Signal(unix.SIGINT)
			default:
				cmd.Process.Signal(s)
			}
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "private libvirt: waiting:", err)
			return 1
		}
		if pid == cmd.Process.Pid {
			return protocol.ExitCode(status)
		}
	}
}

// privateFileSystems gives the namespace its own /proc, /etc, /run, /dev/kvm
// and everything that libvirt writes to.
func privateFileSystems() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	// Control groups out of sight. A machine without them is fine too.
	if err := unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("detaching /sys/fs/cgroup: %w", err)
	}
	// A shim keeps readings in a directory of /var/lib that a machine needn't have: what is written there goes to a tmpfs.
	if err := layer("/var/lib"); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/var/log", "/var/lib/libvirt", "/var/cache/libvirt"} {
		// Nothing is created on the machine: what it lacks is made on a tmpfs further up.
		at := dir
		for !isDir(at) {
			at = filepath.Dir(at)
		}
		if err := unix.Mount("ftclock-test", at, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mounting tmpfs at %s: %w", at, err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	etc := filepath.Join(Dir, "etc")
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return err
	}
	// An emulated host that an ordinary user brought up can't read all of it; it does without.
	if out, err := exec.Command("cp", "-a", "/etc", etc).CombinedOutput(); err != nil && !(kvmhost.Emulated() && isDir(etc)) {
		return fmt.Errorf("copying /etc: %w: %s", err, out)
	}
	if err := os.RemoveAll(filepath.Join(etc, "libvirt")); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(etc, "libvirt/hooks"), 0o755); err != nil {
		return err
	}
	if err := unix.Mount(etc, "/etc", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting /etc: %w", err)
	}
	return ownKVM()
}

// layer has everything that is written below dir go to a tmpfs.
func layer(dir string) error {
	// The tmpfs is found by the overlay alone: another one is mounted over its place.
	if err := unix.Mount("ftclock-test", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mounting tmpfs at /run: %w", err)
	}
	for _, sub := range []string{"/run/upper", "/run/work"} {
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
	}
	err := unix.Mount("ftclock-test", dir, "overlay", 0, "lowerdir="+dir+",upperdir=/run/upper,workdir=/run/work")
	if errors.Is(err, unix.EINVAL) && kvmhost.Emulated() {
		// The kernel lays no third overlay on two others (FILESYSTEM_MAX_STACK_DEPTH): the emulated host's root is one, and that of
		// a private libvirt around this one another. What is written there is gone with the host.
		err = nil
		for _, own := range []string{"ftclock", "libvirt"} {
			at := filepath.Join(dir, own)
			if err == nil {
				err = os.MkdirAll(at, 0o755)
			}
			if err == nil {
				err = unix.Mount("ftclock-test", at, "tmpfs", 0, "mode=0755")
			}
		}
	}
	if err != nil {
		return fmt.Errorf("mounting an overlay at %s: %w", dir, err)
	}
	return nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// ownKVM puts a node that the group kvm may open over /dev/kvm.
func ownKVM() error {
	var st unix.Stat_t
	if err := unix.Stat("/dev/kvm", &st); err != nil {
		return fmt.Errorf("/dev/kvm: %w", err)
	}
	group, err := groupID("kvm")
	if err != nil {
		return err
	}
	node := filepath.Join(Dir, "kvm")
	if err := unix.Mknod(node, unix.S_IFCHR|0o660, int(st.Rdev)); err != nil {
		return fmt.Errorf("making a node of /dev/kvm: %w", err)
	}
	if err := os.Chown(node, 0, group); err != nil {
		return err
	}
	if err := os.Chmod(node, 0o660); err != nil { // whatever the umask
		return err
	}
	if err := unix.Mount(node, "/dev/kvm", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting /dev/kvm: %w", err)
	}
	return nil
}

// loopbackUp is "ip link set lo up".
func loopbackUp() error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(sock)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return os.NewSyscallError("ioctl", unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, req))
}

// Inside tells whether this program runs inside its private libvirt.
func Inside() bool {
	return stage == "inner"
}
