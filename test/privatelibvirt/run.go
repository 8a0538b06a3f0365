package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"ftclock/control"
	"ftclock/test/guest"
	"ftclock/test/qmp"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// Started defines and starts a domain with the kvmclock guest, and waits until its clock moves. The caller removes the
// domain and closes the clock; where it fails nothing is left.
func Started(conn *libvirt.Connect, x *libvirtxml.Domain) (*Domain, *guest.Clock, error) {
	d, err := Define(conn, x)
	if err != nil {
		return nil, nil, err
	}
	if err := d.Create(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("starting %s: %w", x.Name, err), d.Remove())
	}
	clock, err := d.Clock()
	if err != nil {
		return nil, nil, errors.Join(err, d.Remove())
	}
	return d, clock, nil
}

// Pause suspends the domain through libvirt for that long, and a little longer.
func (d *Domain) Pause(length time.Duration) error {
	if err := d.Suspend(); err != nil {
		return fmt.Errorf("suspending %s: %w", d.Name, err)
	}
	time.Sleep(length)
	if err := d.Resume(); err != nil {
		return fmt.Errorf("resuming %s: %w", d.Name, err)
	}
	return nil
}

// Status asks the domain's shim, with that many of the newest records, 256 at most. It is an error that wraps
// os.ErrNotExist where no shim serves the domain.
func (d *Domain) Status(records int) (*control.Status, error) {
	uuid, err := d.GetUUIDString()
	if err != nil {
		return nil, err
	}
	answer, err := control.Ask(control.Dir, uuid, control.Request{Do: "status", Records: records})
	return answer.Status, err
}

// BareQEMU starts a QEMU with the kvmclock guest that libvirt knows nothing of, with those arguments more, and connects
// to its monitor. The caller ends both.
func BareQEMU(name, elf string, args ...string) (*exec.Cmd, *qmp.Conn, error) {
	dir, err := QEMUDir("bare")
	if err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(dir, name+".sock")
	qemu := exec.Command("qemu-system-x86_64", append([]string{"-accel", "kvm", "-machine", "pc,memory-backend=ram", "-m", "32",
		"-object", "memory-backend-memfd,id=ram,size=32M,share=on", "-nodefaults", "-display", "none", "-kernel", elf, "-name", name,
		"-chardev", "socket,id=m,path=" + socket + ",server=on,wait=off", "-mon", "chardev=m,mode=control"}, args...)...)
	qemu.Stderr = os.Stderr
	if err := qemu.Start(); err != nil {
		return nil, nil, err
	}
	monitor, err := qmp.Dial(socket, 30*time.Second)
	if err != nil {
		_ = qemu.Process.Kill()
		_ = qemu.Wait()
		return nil, nil, err
	}
	return qemu, monitor, nil
}
