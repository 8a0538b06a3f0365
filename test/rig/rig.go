package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"ftclock/control"
	"ftclock/spawn"
	"ftclock/test/qmp"

	"golang.org/x/sys/unix"
)

const patience = 60 * time.Second

// clock lets a guest wait for its turn for as long as others are measured: that isn't to be taken for a suspend. Without KVM
// there is no clock to keep, and the shim relays all the same.
const clock = `<clock xmlns="urn:ftclock:domain:1" required="no"><on event="checkpoint" do="catch-up" limit="15m"/></clock>`

// KVM tells whether QEMUs run on KVM. Where they don't, a message's way through the shim is what it is with KVM; the module
// has nothing to do.
func KVM() bool {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(kvm)
	return true
}

// Missing says in one line what this machine lacks, with the fix, or is empty.
func Missing() string {
	for _, needed := range []string{"qemu-system-x86_64", "socat"} {
		if _, err := exec.LookPath(needed); err != nil {
			return err.Error() + "; fix: apt-get install qemu-system-x86 socat"
		}
	}
	return ""
}

// QEMU is a running one. Everything of it is in a directory of its own.
type QEMU struct {
	PID  int
	UUID string // of its shim
	// Shim is the pid of its shim, once it has one.
	Shim int
	// Socat is the pid of the socat before it, once it has one.
	Socat int

	dir      string
	programs []*program // QEMU is the first
	conns    []*qmp.Conn
}

type program struct {
	cmd  *exec.Cmd
	dead chan struct{} // closed after it was reaped
}

// Monitors that each QEMU has. A monitor has one client.
const (
	Direct = "direct"  // for a connection to QEMU itself
	Relay  = "monitor" // for the shim, under libvirt's name
	Second = "socat"   // for socat
)

// Start starts a QEMU with those further arguments, and variables in its environment, on KVM where there is one.
func Start(env []string, args ...string) (_ *QEMU, err error) {
	q := &QEMU{}
	if q.dir, err = os.MkdirTemp("", "ftclock-rig-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			q.Close()
		}
	}()
	accel := "tcg"
	if KVM() {
		accel = "kvm"
	}
	all := []string{"-accel", accel, "-nodefaults", "-display", "none"}
	monitors := []string{Relay, Direct, Second}
	for _, id := range monitors {
		all = append(all, "-chardev", "socket,id="+id+",path="+q.path(id+".sock")+",server=on,wait=off", "-mon", "chardev="+id+",mode=control")
	}
	cmd, err := q.run("qemu-system-x86_64", env, nil, append(all, args...)...)
	if err != nil {
		return nil, err
	}
	q.PID = cmd.Process.Pid
	q.UUID = fmt.Sprintf("6695eb01-f6a4-8304-79aa-%012d", q.PID)
	for _, id := range monitors {
		if err := await(q.path(id + ".sock")); err != nil {
			said, _ := os.ReadFile(q.path("qemu-system-x86_64.log"))
			return nil, fmt.Errorf("%w; QEMU says: %s", err, said)
		}
	}
	return q, nil
}

// Close ends QEMU; what is before its monitors ends by that.
func (q *QEMU) Close() {
	for i, p := range q.programs {
		if i == 0 {
			_ = p.cmd.Process.Kill()
			for _, c := range q.conns {
				_ = c.Close()
			}
		}
		select {
		case <-p.dead:
		case <-time.After(patience):
			_ = p.cmd.Process.Kill()
			<-p.dead
		}
	}
	_ = os.RemoveAll(q.dir)
}

func (q *QEMU) path(name string) string { return filepath.Join(q.dir, name) }

func (q *QEMU) run(name string, env []string, files []*os.File, args ...string) (*exec.Cmd, error) {
	cmd := exec.Command(name, args...)
	log, err := os.Create(q.path(filepath.Base(name) + ".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stderr = log
	cmd.Env = append(os.Environ(), env...)
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &program{cmd, make(chan struct{})}
	q.programs = append(q.programs, p)
	go func() {
		_ = cmd.Wait()
		close(p.dead)
	}()
	return cmd, nil
}

func await(path string) error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s doesn't appear", path)
}

// Dial connects to QEMU itself. Close closes the connection.
func (q *QEMU) Dial() (*qmp.Conn, error) { return q.dial(Direct + ".sock") }

func (q *QEMU) dial(socket string) (*qmp.Conn, error) {
	c, err := qmp.Dial(q.path(socket), patience)
	if err == nil {
		q.conns = append(q.conns, c)
	}
	return c, err
}

// DialSocat puts a socat before a monitor and connects to it.
func (q *QEMU) DialSocat() (*qmp.Conn, error) {
	cmd, err := q.run("socat", nil, nil, "UNIX-LISTEN:"+q.path("via-socat"), "UNIX-CONNECT:"+q.path(Second+".sock"))
	if err != nil {
		return nil, err
	}
	q.Socat = cmd.Process.Pid
	if err := await(q.path("via-socat")); err != nil {
		return nil, err
	}
	return q.dial("via-socat")
}

// DialShim puts the shim of bin before a monitor, as the hook does, connects to it and has the guest go on, for which the
// shim loads the module of bin, where QEMU runs on KVM.
func (q *QEMU) DialShim(bin string) (*qmp.Conn, error) {
	shim, err := filepath.Abs(filepath.Join(bin, "ftclock-shim"))
	if err != nil {
		return nil, err
	}
	module, err := filepath.Abs(filepath.Join(bin, "libftclock-qemu.so"))
	if err != nil {
		return nil, err
	}
	// QEMU listens on monitor.sock, as under libvirt, which is renamed, as by the hook.
	if err := os.Rename(q.path(Relay+".sock"), q.path("monitor.qemu")); err != nil {
		return nil, err
	}
	if err := os.WriteFile(q.path("qemu.pid"), []byte(strconv.Itoa(q.PID)), 0o600); err != nil {
		return nil, err
	}
	// As systemd does, but that nobody holds the descriptors.
	state := q.path("state")
	if err := spawn.Leave(state, spawn.Spec{
		UUID: q.UUID, Name: "rig", Clock: clock, Module: module, DomainDir: q.dir, PIDFile: q.path("qemu.pid"), Stops: q.path("stops"),
	}); err != nil {
		return nil, err
	}
	cmd, err := q.run(shim, []string{"GOMAXPROCS=1"}, nil, "-state", state, q.UUID)
	if err != nil {
		return nil, err
	}
	q.Shim = cmd.Process.Pid
	for end := time.Now().Add(patience); spawn.Waiting(state, q.UUID); time.Sleep(10 * time.Millisecond) {
		if reason := spawn.Refusal(state, q.UUID); reason != "" || time.Now().After(end) {
			return nil, fmt.Errorf("the shim doesn't get ready: %s", reason)
		}
	}
	conn, err := q.dial(Relay + ".sock")
	if err != nil {
		return nil, err
	}
	if _, err := conn.Execute("cont", nil); err != nil {
		return nil, err
	}
	status, err := q.Status(0)
	if err != nil {
		return nil, err
	}
	if want := map[bool]control.State{true: control.Correcting, false: control.Uncorrected}[KVM()]; status.State != want {
		return nil, fmt.Errorf("the shim is %s: %s", status.State, status.Why)
	}
	return conn, nil
}

// Status asks the shim, and for so many of the newest records.
func (q *QEMU) Status(records int) (*control.Status, error) {
	answer, err := control.Ask(q.path("state"), q.UUID, control.Request{Do: "status", Records: records})
	if err != nil {
		return nil, err
	}
	if answer.Status == nil {
		return nil, errors.New("the shim gives no status: " + answer.Error)
	}
	return answer.Status, nil
}
