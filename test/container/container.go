package container

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bootWait bounds a boot; ten seconds are usual.
const bootWait = 3 * time.Minute

// Options are what containers can differ in.
type Options struct {
	// Packages are in the image beside the package's own Packages.
	Packages []string
	// Binds are directories of the machine that the container sees, and may write to: outside to inside. A journal that is to be
	// read after the container's end goes to a bind at /var/log/journal.
	Binds map[string]string
}

// Container is a Debian that runs.
type Container struct {
	// Leader is the container's process 1, as the machine numbers it.
	Leader int

	nspawn  *exec.Cmd
	ended   chan struct{} // closed when nspawn is
	scratch string
	group   string // control group
	console string // file
}

// Start boots a suite's image and waits until systemd has started everything. The container ends with this process, if
// Close doesn't end it before.
func Start(suite string, o Options) (*Container, error) {
	image, err := Image(suite, o.Packages...)
	if err != nil {
		return nil, err
	}
	c := &Container{ended: make(chan struct{})}
	if c.scratch, err = os.MkdirTemp("", "ftclock-container-"); err != nil {
		return nil, err
	}
	if err := c.boot(image, o); err != nil {
		err = fmt.Errorf("booting %s: %w\n%s", suite, err, c.Console())
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Container) boot(image string, o Options) error {
	kvm, err := c.kvmNode(image)
	if err != nil {
		return err
	}
	args := []string{
		"-D", image, "--volatile=overlay", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--private-network",
		"--link-journal=no", "--capability=all", "--machine=" + filepath.Base(c.scratch), "--bind=" + kvm + ":/dev/kvm",
	}
	for outside, inside := range o.Binds {
		args = append(args, "--bind="+outside+":"+inside)
	}
	c.console = filepath.Join(c.scratch, "console")
	console, err := os.Create(c.console)
	if err != nil {
		return err
	}
	defer console.Close()
	c.nspawn = exec.Command("systemd-nspawn", args...)
	c.nspawn.Stdout, c.nspawn.Stderr = console, console
	// Control groups of the second version, as both Debians have them, and writable: libvirt makes some.
	c.nspawn.Env = append(os.Environ(), "UNIFIED_CGROUP_HIERARCHY=1")
	group, err := c.controlGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	c.nspawn.SysProcAttr = &syscall.SysProcAttr{
		// On SIGTERM it shuts the container down; killed, it would leave it.
		Setsid: true, Pdeathsig: unix.SIGTERM, UseCgroupFD: true, CgroupFD: int(group.Fd()),
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the death signal comes when the creating thread ends, not the process
		err := c.nspawn.Start()
		started <- err
		if err == nil {
			_ = c.nspawn.Wait()
		}
		close(c.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	return c.waitBooted()
}

// controlGroup makes a control group below this process's. Without one of its own a container would share its units'
// with others, and with the machine.
func (c *Container) controlGroup() (*os.File, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for _, mount := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
			var fs unix.Statfs_t
			if unix.Statfs(mount, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
				c.group = filepath.Join(mount, path, filepath.Base(c.scratch))
				if err := os.Mkdir(c.group, 0o755); err != nil {
					return nil, err
				}
				return os.Open(c.group)
			}
		}
	}
	return nil, errors.New("no control groups of the second version; fix: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// removeGroup removes the control group and those in it, once their processes have gone.
func (c *Container) removeGroup() {
	for end := time.Now().Add(10 * time.Second); c.group != "" && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var dirs []string
		_ = filepath.WalkDir(c.group, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			_ = unix.Rmdir(dir)
		}
		if len(dirs) == 0 {
			return
		}
	}
}

// kvmNode makes a node of /dev/kvm's that the image's group kvm may open.
func (c *Container) kvmNode(image string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat("/dev/kvm", &st); err != nil {
		return "", fmt.Errorf("/dev/kvm: %w", err)
	}
	groups, err := os.ReadFile(filepath.Join(image, "etc/group"))
	if err != nil {
		return "", err
	}
	group := -1
	for line := range strings.Lines(string(groups)) {
		if fields := strings.Split(line, ":"); len(fields) > 2 && fields[0] == "kvm" {
			group, _ = strconv.Atoi(fields[2])
		}
	}
	if group < 0 {
		return "", errors.New("the image has no group kvm")
	}
	node := filepath.Join(c.scratch, "kvm")
	if err := unix.Mknod(node, unix.S_IFCHR, int(st.Rdev)); err != nil {
		return "", os.NewSyscallError("mknod", err)
	}
	return node, errors.Join(os.Chown(node, 0, group), os.Chmod(node, 0o660))
}

func (c *Container) waitBooted() error {
	var last string
	for end := time.Now().Add(bootWait); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if !c.Running() {
			return errors.New("it ended")
		}
		if c.Leader == 0 {
			if c.Leader = leader(c.nspawn.Process.Pid); c.Leader == 0 {
				continue
			}
		}
		out, _ := c.Run("systemctl", "is-system-running")
		switch last = strings.TrimSpace(out); last {
		case "running", "degraded":
			return c.showController()
		}
	}
	return fmt.Errorf("not up in %v: %s", bootWait, last)
}

// showController has libvirt run domains as on a host, in a scope of systemd-machined's. It does so where the second
// version of control groups has a controller; on a machine that uses them all in the first version, the container is
// told of one that libvirt doesn't use.
func (c *Container) showController() error {
	const controllers = "/sys/fs/cgroup/cgroup.controllers"
	if text, err := os.ReadFile(c.Path(controllers)); err != nil || len(bytes.TrimSpace(text)) > 0 {
		return err
	}
	_, err := c.Run("sh", "-c", "echo hugetlb >/run/controllers && mount --bind /run/controllers "+controllers)
	return err
}

// leader finds process 1 of the container: a child, or a child's, of nspawn's that is 1 in a namespace of its own; 0 if it
// isn't there yet.
func leader(pid int) int {
	children, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range children {
		text, _ := os.ReadFile(file)
		for _, field := range strings.Fields(string(text)) {
			child, _ := strconv.Atoi(field)
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
			for line := range strings.Lines(string(status)) {
				if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
					if numbers := strings.Fields(ids); len(numbers) > 1 && numbers[len(numbers)-1] == "1" {
						return child
					}
				}
			}
			if found := leader(child); found != 0 {
				return found
			}
		}
	}
	return 0
}

// Command is a command that runs inside, as root, with a plain environment. Like every child it has to be waited for.
func (c *Container) Command(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(c.Leader), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "--"}, args...)...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root",
		"TERM=dumb", "DEBIAN_FRONTEND=noninteractive"}
	return cmd
}

// Run runs a command inside and gives what it prints, both streams, with the error where it fails.
func (c *Container) Run(args ...string) (string, error) {
	out, err := c.Command(args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

// Path is where the machine finds a path of the container's.
func (c *Container) Path(inside string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", c.Leader), inside)
}

// Outside gives the machine's number of a process that is pid inside; 0 if there is none.
func (c *Container) Outside(pid int) int {
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", c.Leader))
	if err != nil {
		return 0
	}
	all, _ := filepath.Glob("/proc/[0-9]*/ns/pid")
	for _, link := range all {
		if target, err := os.Readlink(link); err != nil || target != space {
			continue
		}
		number := strings.Split(link, "/")[2]
		status, _ := os.ReadFile("/proc/" + number + "/status")
		for line := range strings.Lines(string(status)) {
			if ids, ok := strings.CutPrefix(line, "NSpid:"); ok && strings.HasSuffix(strings.TrimSpace(ids), "\t"+strconv.Itoa(pid)) {
				outside, _ := strconv.Atoi(number)
				return outside
			}
		}
	}
	return 0
}

// Console is what has come on the console so far.
func (c *Container) Console() string {
	text, _ := os.ReadFile(c.console)
	return string(text)
}

// Running tells whether the container hasn't ended.
func (c *Container) Running() bool {
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

// PowerOff shuts the container down as a machine is, and waits for its end.
func (c *Container) PowerOff(patience time.Duration) error {
	if out, err := c.Run("systemctl", "poweroff"); err != nil && c.Running() {
		return fmt.Errorf("powering off: %w: %s", err, out)
	}
	select {
	case <-c.ended:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("powering off: it takes longer than %v\n%s", patience, c.Console())
	}
}

// Close ends the container at once and removes what it left.
func (c *Container) Close() {
	if c.nspawn != nil && c.nspawn.Process != nil && c.Running() {
		if c.Leader == 0 {
			c.Leader = leader(c.nspawn.Process.Pid)
		}
		if c.Leader != 0 {
			_ = unix.Kill(c.Leader, unix.SIGKILL) // and with it everything in its namespace
		} else {
			_ = c.nspawn.Process.Kill()
		}
		<-c.ended
	}
	c.removeGroup()
	_ = os.RemoveAll(c.scratch)
}
