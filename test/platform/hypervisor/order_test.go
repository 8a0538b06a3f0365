// Needed by: the order of the shim. What it writes into the page before it
// forwards a cont is there when KVM_SET_CLOCK comes, because QEMU writes the
// clock within cont; and the record of that write is complete when cont
// returns, but not yet when the RESUME event comes. At stop the clock is read
// before the STOP event. And by the module, which compares 32 bits: QEMU
// passes ioctl requests as int, so that those above 2 GiB arrive
// sign-extended.

package hypervisor

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"

	"golang.org/x/sys/unix"
)

// trace runs act while strace follows QEMU, and returns what it printed.
func trace(t *testing.T, pid int, act func(), options ...string) string {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		privatelibvirt.LeaveOut(t, "strace is missing; fix: apt-get install strace")
	}
	out := filepath.Join(t.TempDir(), "trace")
	strace := exec.Command("strace", append(options, "-f", "-s", "300", "-o", out, "-p", strconv.Itoa(pid))...)
	stderr := check.Value(strace.StderrPipe())(t)
	check.NoError(t, strace.Start())
	attached := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			select {
			case attached <- lines.Text():
			default:
			}
		}
		close(attached)
	}()
	select {
	case line, ok := <-attached:
		if !ok || !strings.Contains(line, "attached") {
			strace.Wait()
			privatelibvirt.LeaveOut(t, "strace can't attach ("+line+"); fix: sysctl kernel.yama.ptrace_scope=1")
		}
	case <-time.After(time.Minute):
		t.Error("strace doesn't attach")
	}
	act()
	strace.Process.Signal(unix.SIGINT) // detaches
	strace.Wait()
	text := check.Value(os.ReadFile(out))(t)
	return string(text)
}

func stopAndCont(t *testing.T, monitor *qmp.Conn) func() {
	return func() {
		if err := monitor.Run("stop", "cont"); err != nil {
			t.Error(err)
		}
	}
}

func TestKVMOrderOfStopAndCont(t *testing.T) {
	pid, monitor := startQEMU(t)
	text := trace(t, pid, stopAndCont(t, monitor), "-e", "trace=ioctl,sendmsg,write")
	var got []string
	for _, m := range regexp.MustCompile(`KVM_GET_CLOCK|KVM_SET_CLOCK|\\"event\\": \\"(STOP|RESUME)\\"|\\"return\\": \{\}`).FindAllString(text, -1) {
		got = append(got, strings.ReplaceAll(m, `\"`, `"`))
	}
	want := []string{
		"KVM_GET_CLOCK", `"event": "STOP"`, `"return": {}`,
		`"event": "RESUME"`, "KVM_SET_CLOCK", `"return": {}`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("QEMU's order\n%q\nnot\n%q\n%s", got, want, text)
	}
}

func TestKVMRequestsArriveSignExtended(t *testing.T) {
	pid, monitor := startQEMU(t)
	text := trace(t, pid, stopAndCont(t, monitor), "-e", "trace=ioctl", "-e", "raw=ioctl")
	// KVM_SET_CLOCK has bit 31 clear.
	for _, request := range []string{"0xffffffff8030ae7c", "0x4030ae7b"} {
		if !regexp.MustCompile(`ioctl\(0x[0-9a-f]+, ` + request + `,`).MatchString(text) {
			t.Errorf("QEMU made no ioctl %s:\n%s", request, text)
		}
	}
}
