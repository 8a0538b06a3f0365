package node

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/attach"
	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
)

// muslQEMU stands in for Alpine's QEMU: a program for musl that has a virtual machine and a main thread as QEMU's. It answers a byte
// on its standard input by a line.
func muslQEMU(t *testing.T, name string) (pid int, answers func()) {
	t.Helper()
	program := filepath.Join(dir, "qemu-system-musl")
	check.NoError(t, os.Rename(check.Value(built.Copy(built.TargetMusl, dir))(t), program))
	t.Cleanup(func() { _ = os.Remove(program) })
	cmd := exec.Command(program, "kvm", "forever", "-name", "guest="+name)
	stdin := check.Value(cmd.StdinPipe())(t)
	stdout := check.Value(cmd.StdoutPipe())(t)
	check.NoError(t, cmd.Start())
	lines := bufio.NewReader(stdout)
	says := func(want string) {
		t.Helper()
		if line, err := lines.ReadString('\n'); err != nil || !strings.HasPrefix(line, want) {
			t.Fatalf("the stand-in says %q, %v, want %q", line, err, want)
		}
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the stand-in was harmed: %v", err)
		}
	})
	says("ready")
	return cmd.Process.Pid, func() {
		t.Helper()
		check.Value(io.WriteString(stdin, "?"))(t)
		says("ok ")
	}
}

// A QEMU for musl is left alone with a clear word, by the service and by who asks for it, and runs on.
func TestKVMNodeRefusesMusl(t *testing.T) {
	const why = "built for the C library musl (its dynamic linker is /lib/ld-musl-x86_64.so.1), and the module needs glibc"
	named(t, "ha-*")
	node := startService(t)
	pid, answers := muslQEMU(t, "ha-musl")
	node.await(t, fmt.Sprintf("ha-musl (QEMU %d) is left alone: ", pid))
	if said := node.says(); !strings.Contains(said, why) || strings.Contains(said, "is served from now on") {
		t.Errorf("the service says:\n%s", said)
	}
	answers()

	cmd := exec.Command(binary(t), "attach", fmt.Sprint(pid))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 3 || !strings.Contains(stderr.String(), why) || strings.Count(stderr.String(), "ftclock: error: ") != 1 {
		t.Errorf("attach ends with %v and says:\n%s", err, stderr.String())
	}
	answers()

	if _, loaded, err := attach.Loaded(pid); loaded || err != nil {
		t.Errorf("a module is in it: %t, %v", loaded, err)
	}
	maps := string(check.Value(os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid)))(t))
	if strings.Contains(maps, "memfd:") || strings.Contains(maps, "libftclock") {
		t.Errorf("something of ftclock's is mapped in it:\n%s", maps)
	}
	if infos := check.Value(control.List(control.Dir))(t); len(infos) > 0 {
		t.Errorf("a shim was started: %+v", infos)
	}
}
