package wholehost

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/guest"
)

// kolla are the flags with which OpenStack's kolla runs libvirtd, of which the last share directories with the host. The container's root
// is the host's own, below what the container writes: so it has the host's libvirt, QEMU and ftclock.
var kolla = []string{"--privileged", "--pid=host", "--network=host", "--cgroupns=host", "--volume=/run:/run:shared", "--volume=/dev:/dev",
	"--volume=/sys/fs/cgroup:/sys/fs/cgroup", "--volume=/etc/libvirt:/etc/libvirt"}

const libvirts = "--volume=/var/lib/libvirt:/var/lib/libvirt"

// libvirtd runs in a container that is restarted at will, as OpenStack's kolla has it. Two domains, of which one is managed, live
// through all restarts, and through a new container. The managed one is checkpointed meanwhile, and its clock loses nothing.
// FTCLOCK_LONG makes 20 restarts instead of 5.
func TestKVMPodman(t *testing.T) {
	restarts := 5
	if os.Getenv("FTCLOCK_LONG") == "1" {
		restarts = 20
	}
	h := newHost(t, "podman", "crun")
	h.plug()
	h.install()
	h.must("systemctl", "mask", "--now", "libvirtd.service", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket",
		"virtlogd.service", "virtlogd.socket", "virtlogd-admin.socket", "virtlockd.service", "virtlockd.socket", "virtlockd-admin.socket")
	h.must("sh", "-c", `echo 'stdio_handler = "file"' >>/etc/libvirt/qemu.conf`)
	// What a container writes can't lie on an overlay, as the host's root is one. podman has noted so when the host came up.
	h.must("sh", "-c", "mount -t tmpfs tmpfs /var/lib/containers && rm -rf /run/containers /run/libpod")

	// libvirt's directory is the container's: no shim of the host's could serve a domain.
	h.contain()
	h.define("web1")
	if out, err := h.Run("virsh", "start", "web1"); err == nil || !strings.Contains(out, "isn't the host's") || !strings.Contains(out, "fix: ") {
		t.Errorf("a start without %s: %v\n%s", libvirts, err, out)
	}
	h.must("podman", "rm", "-f", "-t", "60", "libvirt")

	h.contain(libvirts)
	h.must("sh", "-c", "virsh dumpxml --inactive web1 | sed -e 's/web1/plain/g' -e '/<uuid>/d' -e '/<metadata>/,/<\\/metadata>/d' >/root/plain.xml && virsh define /root/plain.xml")
	both := []string{"web1", "plain"}
	for _, name := range both {
		h.must("virsh", "start", name)
	}
	h.must("ftclock", "exercise", "web1", "--rate", "20", "--pause", "5", "--count", "20")
	unit, began := h.unit("web1"), h.processes(both)
	served := h.property(unit, "MainPID")
	for _, pid := range append(began, served) {
		t.Logf("process %s is in %s", pid, h.must("cat", "/proc/"+pid+"/cgroup"))
	}
	before := h.read(both)

	stop := h.checkpointed("web1", 5)
	for n := range restarts {
		h.must("podman", "restart", "-t", "60", "libvirt")
		h.reconnected(both)
		if now := h.processes(both); fmt.Sprint(now) != fmt.Sprint(began) {
			t.Fatalf("after restart %d the QEMUs are %v, were %v", n+1, now, began)
		}
	}
	if runs := stop(); runs == 0 {
		t.Error("no checkpoints were made between restarts")
	}
	h.must("podman", "rm", "-f", "-t", "60", "libvirt")
	h.contain(libvirts)
	h.reconnected(both)
	if now := h.processes(both); fmt.Sprint(now) != fmt.Sprint(began) {
		t.Fatalf("in a new container the QEMUs are %v, were %v", now, began)
	}
	h.must("ftclock", "exercise", "web1", "--rate", "20", "--pause", "5", "--count", "20")
	after := h.read(both)
	drift := after["web1"].offset - before["web1"].offset
	t.Logf("drift of %d ns after %d restarts and a new container; %d ns without ftclock and checkpoints", drift, restarts,
		after["plain"].offset-before["plain"].offset)
	check.Within(t, drift, guest.MaxDrift, "drift")
	if pid, again := h.property(unit, "MainPID"), h.property(unit, "NRestarts"); pid != served || again != "0" {
		t.Errorf("the shim is process %s, was %s, and was started again %s times", pid, served, again)
	}
	if out, err := h.Run("ftclock", "status"); err != nil || strings.Count(out, "correcting") != 1 {
		t.Errorf("status: %v\n%s", err, out)
	}
	for _, name := range both { // as every other domain
		h.must("virsh", "destroy", name)
		h.must("virsh", "start", name)
	}
	h.must("ftclock", "exercise", "web1", "--rate", "20", "--pause", "5", "--count", "20")
}

// contain starts libvirtd in a container, and waits until it answers.
func (h *host) contain(volumes ...string) {
	h.t.Helper()
	args := append([]string{"podman", "run", "--detach", "--name=libvirt"}, kolla...)
	args = append(append(args, volumes...), "--rootfs", "/:O", "/usr/sbin/libvirtd")
	h.must(args...)
	h.answers()
}

func (h *host) answers() {
	h.t.Helper()
	h.eventually("libvirtd in its container", func() bool {
		_, err := h.Run("virsh", "list")
		return err == nil
	})
}

// reconnected waits until libvirtd has found its domains again, and they run. A client that was cut off may have left one paused.
func (h *host) reconnected(names []string) {
	h.t.Helper()
	h.answers()
	h.eventually(fmt.Sprintf("%v running", names), func() bool {
		for _, name := range names {
			out, err := h.Run("virsh", "domstate", name)
			if err == nil && strings.Contains(out, "paused") {
				_, _ = h.Run("virsh", "resume", name)
			}
			if err != nil || !strings.Contains(out, "running") {
				return false
			}
		}
		return true
	})
}

// processes are the domains' QEMUs.
func (h *host) processes(names []string) (pids []string) {
	h.t.Helper()
	for _, name := range names {
		pid := strings.TrimSpace(h.must("cat", filepath.Join("/run/libvirt/qemu", name+".pid")))
		h.must("test", "-e", "/proc/"+pid+"/exe")
		pids = append(pids, pid)
	}
	return pids
}
