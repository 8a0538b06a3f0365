package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/host"
	"ftclock/policy"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"
)

const insideVariable = "FTCLOCK_NODE_INSIDE"

// dir is for what QEMUs must reach, whoever they run as.
const dir = "/run/ftclock-test"

var elf string // the kvmclock guest

// The tests run in a mount namespace of their own.
func TestMain(m *testing.M) {
	if os.Getenv(insideVariable) == "" {
		os.Exit(outside())
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "preparing the tests' mounts:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func outside() int {
	if missing := privatelibvirt.Missing(); len(missing) > 0 {
		fmt.Fprintf(os.Stderr, "LEFT OUT: everything in test/node: %s\n", strings.Join(missing, "; "))
		if privatelibvirt.Required() {
			return 1
		}
		return 0
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// prepare mounts what ftclock writes to, a policy, and a /dev/kvm that all users may open.
func prepare() error {
	for _, at := range []string{"/run", "/var/lib", "/var/log"} {
		if err := unix.Mount("ftclock-test", at, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mounting tmpfs at %s: %w", at, err)
		}
	}
	etc := dir + "/etc"
	if err := os.MkdirAll(etc+"/ftclock/policy.d", 0o755); err != nil {
		return err
	}
	for _, name := range []string{"ld.so.cache", "passwd", "group", "nsswitch.conf"} {
		if text, err := os.ReadFile("/etc/" + name); err == nil {
			if err := os.WriteFile(etc+"/"+name, text, 0o644); err != nil {
				return err
			}
		}
	}
	if err := unix.Mount(etc, "/etc", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting /etc: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/dev/kvm", &st); err != nil {
		return err
	}
	kvm := dir + "/kvm"
	if err := errors.Join(unix.Mknod(kvm, unix.S_IFCHR|0o666, int(st.Rdev)), os.Chmod(kvm, 0o666), unix.Mount(kvm, "/dev/kvm", "", unix.MS_BIND, "")); err != nil {
		return fmt.Errorf("mounting /dev/kvm: %w", err)
	}
	if err := errors.Join(os.Mkdir(dir+"/monitors", 0o777), os.Chmod(dir+"/monitors", 0o777)); err != nil {
		return err
	}
	var err error
	elf, err = guest.Copy(dir)
	return err
}

// named has a file of the host's policy name domains.
func named(t *testing.T, pattern string) {
	t.Helper()
	check.NoError(t, os.WriteFile(filepath.Join(policy.Dir, "a.xml"), []byte(`<policy xmlns="urn:ftclock:policy:1"><for name="`+pattern+
		`"/><clock xmlns="urn:ftclock:domain:1"><on event="checkpoint" do="catch-up" limit="15m"/></clock></policy>`), 0o644))
}

func binary(t *testing.T) string {
	t.Helper()
	return filepath.Join(check.Value(built.Root())(t), "bin/ftclock")
}

// service is a running `ftclock node`.
type service struct {
	cmd *exec.Cmd
	log string
}

func startService(t *testing.T) *service {
	t.Helper()
	s := &service{cmd: exec.Command(binary(t), "node"), log: filepath.Join(t.TempDir(), "log")}
	log := check.Value(os.Create(s.log))(t)
	defer log.Close()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	check.NoError(t, s.cmd.Start())
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("the service says:\n%s", s.says())
		}
	})
	s.await(t, "the kernel tells of each program that starts")
	return s
}

func (s *service) stop(t *testing.T) {
	if s.cmd.ProcessState != nil {
		return
	}
	_ = s.cmd.Process.Signal(unix.SIGTERM)
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("the service ended with %v", err)
	}
}

func (s *service) says() string {
	text, _ := os.ReadFile(s.log)
	return string(text)
}

func (s *service) await(t *testing.T, what string) {
	t.Helper()
	check.Await(t, 5*time.Minute, 20*time.Millisecond, func() bool { return strings.Contains(s.says(), what) }, "the service never says %q", what)
}

func (s *service) descriptors() int {
	all, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	return len(all)
}

// qemu is a QEMU that nobody but the test has started.
type qemu struct {
	name    string
	cmd     *exec.Cmd
	pid     int
	monitor *qmp.Conn
	end     func()
}

// startQEMU starts one. A boxed one has user, mount and pid namespaces of its own, is nobody outside of them, and sees nothing
// of ftclock.
func startQEMU(name string, boxed bool) (*qemu, error) {
	socket := dir + "/monitors/" + name
	args := []string{"qemu-system-x86_64", "-accel", "kvm", "-machine", "pc,memory-backend=ram", "-m", "32",
		"-object", "memory-backend-memfd,id=ram,size=32M,share=on", "-nodefaults", "-display", "none", "-kernel", elf,
		"-name", "guest=" + name + ",debug-threads=on",
		"-chardev", "socket,id=m,path=" + socket + ",server=on,wait=off", "-mon", "chardev=m,mode=control"}
	cmd := exec.Command(args[0], args[1:]...)
	if boxed {
		root, err := built.Root()
		if err != nil {
			return nil, err
		}
		const script = `bin=$1 && shift && mount -t proc proc /proc && mount -t tmpfs none "$bin" && mount -t tmpfs none /tmp && exec "$@"`
		cmd = exec.Command("sh", append([]string{"-c", script, "sh", root + "/bin"}, args...)...)
		ids := []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
			UidMappings: ids, GidMappings: ids, Credential: &syscall.Credential{},
		}
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	q := &qemu{name: name, cmd: cmd, pid: cmd.Process.Pid}
	q.end = sync.OnceFunc(func() {
		if q.monitor != nil {
			_ = q.monitor.Close()
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = os.Remove(socket)
	})
	return q, nil
}

// connect connects to its monitor.
func (q *qemu) connect() (err error) {
	q.monitor, err = qmp.Dial(dir+"/monitors/"+q.name, 5*time.Minute)
	return err
}

// id is what its shim is called.
func (q *qemu) id() string {
	stat, _ := host.ReadStat(q.pid)
	return host.ProcessUUID(q.pid, stat.Started)
}

// status is what its shim says.
func (q *qemu) status() (*control.Status, error) {
	answer, err := control.Ask(control.Dir, q.id(), control.Request{Do: "status", Records: 1})
	if err == nil && answer.Status == nil {
		err = errors.New("no status")
	}
	return answer.Status, err
}

func (q *qemu) served() bool {
	s, err := q.status()
	return err == nil && s.State == control.Correcting && s.QEMU == q.pid
}

// shims are the shim's processes that serve it.
func (q *qemu) shims() (pids []int) {
	id := q.id()
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		text, _ := os.ReadFile(line)
		words := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if strings.HasSuffix(words[0], "ftclock-shim") && words[len(words)-1] == id {
			var pid int
			_, _ = fmt.Sscanf(line, "/proc/%d/", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}
