package attach

import (
	"bufio"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
)

// vm is a QEMU with a monitor.
type vm struct {
	t       *testing.T
	pid     int
	monitor net.Conn
	lines   *bufio.Reader
}

func startQEMU(t *testing.T, accel string, more ...string) *vm {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "monitor.sock")
	args := []string{
		"-accel", accel, "-S", "-nodefaults", "-display", "none",
		"-machine", "pc", "-m", "16", "-qmp", "unix:" + socket + ",server=on,wait=off",
	}
	cmd := exec.Command("qemu-system-x86_64", append(args, more...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	check.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU says: %s", &stderr)
		}
	})
	v := &vm{t: t, pid: cmd.Process.Pid}
	for {
		monitor, err := net.Dial("unix", socket)
		if err == nil {
			v.monitor = monitor
			break
		}
		if _, err := os.Stat(procPath(v.pid, "exe")); err != nil {
			t.Fatalf("QEMU has ended: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Cleanup(func() { v.monitor.Close() })
	v.lines = bufio.NewReader(v.monitor)
	v.read() // the greeting
	v.execute("qmp_capabilities")
	return v
}

func (v *vm) read() map[string]json.RawMessage {
	v.t.Helper()
	line, err := v.lines.ReadBytes('\n')
	if err != nil {
		v.t.Fatalf("reading from the monitor: %v", err)
	}
	var message map[string]json.RawMessage
	check.NoError(v.t, json.Unmarshal(line, &message))
	return message
}

func (v *vm) execute(command string) string {
	v.t.Helper()
	check.Value(v.monitor.Write([]byte(`{"execute":"` + command + `"}`)))(v.t)
	for {
		if answer, ok := v.read()["return"]; ok {
			return string(answer)
		}
	}
}

func TestKVMLoadsIntoQEMU(t *testing.T) {
	needRoot(t)
	needKVM(t)
	mod := module(t)
	for range 5 {
		v := startQEMU(t, "kvm")
		mask := statusField(t, v.pid, "SigBlk")
		check.NoError(t, Check(v.pid, mod))
		if _, ok, err := Loaded(v.pid); ok || err != nil {
			t.Fatal(ok, err)
		}
		result, err := Load(patience(t), v.pid, mod)
		if err != nil || result.Already {
			t.Fatalf("%+v, %v", result, err)
		}
		t.Logf("held for %v, %d looks", result.Stopped, result.Attempts)
		if fd, ok, err := Loaded(v.pid); !ok || err != nil || fd < 3 {
			t.Fatal(fd, ok, err)
		}
		if result, err := Load(patience(t), v.pid, mod); err != nil || result != (Result{Already: true}) {
			t.Fatalf("%+v, %v", result, err)
		}
		if now := statusField(t, v.pid, "SigBlk"); now != mask {
			t.Errorf("the signal mask is %s, it was %s", now, mask)
		}
		for _, command := range []string{"query-status", "cont", "query-status", "stop", "query-status"} {
			v.execute(command)
		}
	}
}

// Libraries are loaded into a QEMU whose guest runs and is stopped and continued all the while.
func TestKVMLoadsWhileTheGuestRuns(t *testing.T) {
	needRoot(t)
	needKVM(t)
	v := startQEMU(t, "kvm")
	good, bad := libraries(t, 20)
	for i := range 60 {
		v.execute([]string{"cont", "stop"}[i%2])
		path := append(good, bad)[i%21]
		if _, err := load(patience(t), v.pid, path, (*subject).isQEMU); (err != nil) != (path == bad) {
			t.Fatalf("loading %s: %v", path, err)
		}
	}
	v.execute("cont")
	v.execute("query-status")
}

// QEMU much as libvirt runs it: in the sandbox (without elevateprivileges=deny, which kills -runas), as another user.
func TestKVMLoadsIntoAConfinedQEMU(t *testing.T) {
	needRoot(t)
	needKVM(t)
	v := startQEMU(t, "kvm", "-runas", "nobody",
		"-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny")
	hidden := t.TempDir()
	check.NoError(t, os.Chmod(hidden, 0o700))
	refuses(t, v.pid, copied(t, module(t), hidden+"/module.so"), nil, "can't be reached by the process (uid 65534")
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // which t.TempDir makes for us alone
		t.Fatal(err)
	}
	check.Value(Load(patience(t), v.pid, copied(t, module(t), dir+"/module.so")))(t)
	if _, ok, err := Loaded(v.pid); !ok || err != nil {
		t.Fatal(ok, err)
	}
	v.execute("query-status")
}

func TestKVMLeavesAnEmulatorAlone(t *testing.T) {
	needRoot(t)
	needKVM(t)
	v := startQEMU(t, "tcg")
	refuses(t, v.pid, module(t), ErrNotQEMU, "no virtual machine")
	v.execute("query-status")
}
