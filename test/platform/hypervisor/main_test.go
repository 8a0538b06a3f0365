package hypervisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"

	"libvirt.org/go/libvirt"
)

var (
	conn *libvirt.Connect
	elf  string // the kvmclock guest
)

func TestMain(m *testing.M) {
	if moved := os.Getenv(relayVariable); moved != "" {
		os.Exit(relay(moved))
	}
	if os.Getenv(hookVariable) != "" {
		os.Exit(hook())
	}
	os.Exit(privatelibvirt.Main(privatelibvirt.WithGuest(&conn, &elf, m.Run), privatelibvirt.Options{Prepare: installHook}))
}

// startQEMU starts a QEMU without libvirt, running, and returns its process
// and its only monitor. Both go with the test.
func startQEMU(t *testing.T) (pid int, monitor *qmp.Conn) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "qmp")
	qemu := exec.Command("qemu-system-x86_64", "-accel", "kvm", "-m", "32", "-nodefaults", "-display", "none",
		"-kernel", elf, "-qmp", "unix:"+socket+",server=on,wait=off")
	check.NoError(t, qemu.Start())
	t.Cleanup(func() {
		qemu.Process.Kill()
		qemu.Wait()
	})
	monitor = check.Value(qmp.Dial(socket, time.Minute))(t)
	t.Cleanup(func() { monitor.Close() })
	return qemu.Process.Pid, monitor
}
