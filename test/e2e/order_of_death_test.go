package e2e

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// QEMU's death reaches libvirt through the shim, which ends as well, and leaves nothing.
func TestKVMQEMUDies(t *testing.T) {
	d, _ := start(t, managed("dies", clockElement))
	pause(t, d, 5*time.Millisecond)
	pid, err := d.PID()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
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
			domain := managed("queue-"+name, x)
			if x == "" {
				domain.Metadata = nil
			}
			d, _ := start(t, domain)
			sockets, err := filepath.Glob("/var/lib/libvirt/qemu/domain-*/monitor.sock")
			if err != nil || len(sockets) != 1 {
				t.Fatalf("sockets: %v, %v", sockets, err)
			}
			t.Chdir(filepath.Dir(sockets[0])) // the whole path may be too long for an address
			second, err := net.Dial("unix", "monitor.sock")
			if err != nil {
				t.Fatal(err)
			}
			defer second.Close()
			_ = second.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			if n, err := second.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("it is served beside libvirt: %d bytes, %v", n, err)
			}
			// libvirt goes on; once it is gone, the second one's turn comes.
			pause(t, d, 5*time.Millisecond)
			if err := privatelibvirt.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = second.SetReadDeadline(time.Now().Add(time.Minute))
			greeting := make([]byte, 8)
			if n, err := second.Read(greeting); err != nil || string(greeting[:n]) != `{"QMP": ` {
				t.Errorf("after libvirtd's end it gets %q, %v", greeting[:n], err)
			}
			second.Close()
			if err := privatelibvirt.Start(); err != nil {
				t.Fatal(err)
			}
			if conn, err = libvirt.NewConnect(privatelibvirt.URI); err != nil {
				t.Fatal(err)
			}
			if d.Domain, err = conn.LookupDomainByName(d.Name); err != nil {
				t.Fatal(err)
			}
			pause(t, d, 5*time.Millisecond)
		})
	}
}
