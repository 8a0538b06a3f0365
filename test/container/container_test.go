package container

import (
	"os"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/privatelibvirt"
)

func TestKVMContainerBoots(t *testing.T) {
	if missing := Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	c := check.Value(Start(Debian12, Options{}))(t)
	defer c.Close()
	if out, err := c.Run("virsh", "-c", "qemu:///system", "capabilities"); err != nil || !strings.Contains(out, "<domain type='kvm'") {
		t.Errorf("libvirt in it: %v\n%s", err, out)
	}
	check.NoError(t, os.WriteFile(c.Path("/etc/written"), []byte("by the test"), 0o644))
	if out, err := c.Run("cat", "/etc/written"); err != nil || out != "by the test" {
		t.Errorf("%v: %s", err, out)
	}
	image := check.Value(Image(Debian12))(t)
	if _, err := os.Stat(image + "/etc/written"); err == nil {
		t.Error("the container writes to its image")
	}
	other := check.Value(Start(Debian12, Options{}))(t)
	defer other.Close()
	for _, in := range []*Container{c, other} {
		if out, err := in.Run("virsh", "-c", "qemu:///system", "list"); err != nil { // an idle libvirtd has ended; its socket starts it
			t.Errorf("libvirt in it: %v\n%s", err, out)
		}
		if out, err := in.Run("cat", "/sys/fs/cgroup/system.slice/libvirtd.service/cgroup.procs"); err != nil || strings.Contains("\n"+out, "\n0\n") {
			t.Errorf("its control groups aren't its own: %v\n%s", err, out)
		}
	}
	if got := c.Outside(1); got != c.Leader {
		t.Errorf("process 1 is %d, not %d", got, c.Leader)
	}
	if err := c.PowerOff(bootWait); err != nil {
		t.Error(err)
	}
	c.Close()
	other.Close()
	for _, ended := range []*Container{c, other} {
		if _, err := os.Stat(ended.Path("/")); err == nil {
			t.Errorf("process %d lives on", ended.Leader)
		}
		if _, err := os.Stat(ended.group); err == nil {
			t.Errorf("%s is left", ended.group)
		}
	}
}
