package e2e

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// QEMU's death reaches libvirt through the shim, which ends as well, and leaves nothing.
func TestKVMQEMUDies(t *testing.T) {
	d, _ := start(t, managed("dies", clockElement))
	pause(t, d, 5*time.Millisecond)
	pid := domaintest.PID(t, d)
	check.NoError(t, unix.Kill(pid, unix.SIGKILL))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		state, reason, err := d.GetState()
		if err == nil && state == libvirt.DOMAIN_SHUTOFF {
			if libvirt.DomainShutoffReason(reason) != libvirt.DOMAIN_SHUTOFF_CRASHED {
				t.Errorf("libvirt takes it for %d, want crashed", reason)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("libvirt doesn't notice: %v, %v", state, err)
		}
	}
	nothingLeft(t)
}

// A second client of the monitor waits in the queue, with ftclock as with QEMU alone.
func TestKVMASecondClientWaits(t *testing.T) {
	for name, x := range map[string]string{"stock": "", "ftclock": clockElement} {
		t.Run(name, func(t *testing.T) {
			d, _ := start(t, managed("queue-"+name, x))
			sockets, err := filepath.Glob("/var/lib/libvirt/qemu/domain-*/monitor.sock")
			if err != nil || len(sockets) != 1 {
				t.Fatalf("sockets: %v, %v", sockets, err)
			}
			t.Chdir(filepath.Dir(sockets[0])) // the whole path may be too long for an address
			second := check.Value(net.Dial("unix", "monitor.sock"))(t)
			defer second.Close()
			_ = second.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			if n, err := second.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("it is served beside libvirt: %d bytes, %v", n, err)
			}
			// libvirt goes on; once it is gone, the second one's turn comes.
			pause(t, d, 5*time.Millisecond)
			check.NoError(t, privatelibvirt.Kill())
			_ = second.SetReadDeadline(time.Now().Add(time.Minute))
			greeting := make([]byte, 8)
			if n, err := second.Read(greeting); err != nil || string(greeting[:n]) != `{"QMP": ` {
				t.Errorf("after libvirtd's end it gets %q, %v", greeting[:n], err)
			}
			second.Close()
			check.NoError(t, privatelibvirt.Start())
			reconnect(t, d)
			pause(t, d, 5*time.Millisecond)
		})
	}
}
