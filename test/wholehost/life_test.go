package wholehost

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/packages"
)

// A host's life with ftclock's package, from its installation to its purge, under two domains of which one is managed: checkpoints,
// restarts and upgrades of everything, reboots, and a power cut. FTCLOCK_SUITE is the Debian.
func TestKVMAHostsLife(t *testing.T) {
	began := time.Now()
	h := newHost(t)
	h.plug()
	lap := func(what string) { t.Logf("%4.0f s: %s", time.Since(began).Seconds(), what) }
	web1 := []string{"web1"}

	if out := h.apt("install", deb(0)); !strings.Contains(out, "systemctl restart libvirtd") && !strings.Contains(out, "systemctl restart virtqemud") {
		t.Errorf("nobody is told to restart libvirt's daemon:\n%s", out)
	}
	h.must("cp", tools+"/guest.elf", "/var/lib/guest.elf")
	h.must("systemctl", "restart", "libvirtd")
	lap("installed")
	h.define("web1")
	h.must("sh", "-c", "virsh dumpxml web1 | sed -e 's/web1/plain/g' -e '/<uuid>/d' -e '/<metadata>/,/<\\/metadata>/d' >/root/plain.xml && virsh define /root/plain.xml")
	h.must("virsh", "start", "web1")
	h.must("virsh", "start", "plain")
	h.denied(t, "a start")
	h.must("virsh", "destroy", "plain")
	h.keepTime(web1, 200)
	lap("200 checkpoints")

	h.must("systemctl", "restart", "libvirtd")
	h.keepTime(web1, 20)
	lap("libvirtd restarted")
	h.upgraded("ftclock", func() { h.apt("install", deb(1)) })
	if out := h.must("journalctl", "--no-pager", "-u", h.unit("web1"), "-g", "version="+packages.Tags[1]); !strings.Contains(out, "ready") {
		t.Errorf("after the upgrade: %s", out)
	}
	lap("ftclock upgraded")
	h.upgraded("libvirt and QEMU", h.reinstallHypervisor)
	h.keepTime(web1, 20)
	lap("libvirt and QEMU installed anew")

	for _, how := range []string{"suspend", "shutdown"} { // the guest ignores the latter
		h.must("sh", "-c", "printf 'ON_BOOT=start\\nON_SHUTDOWN="+how+"\\nSHUTDOWN_TIMEOUT=5\\n' >/etc/default/libvirt-guests; systemctl enable --now libvirt-guests")
		h.reboot()
		h.keepTime(web1, 20)
		h.denied(t, "a reboot")
		lap("rebooted, with libvirt-guests set to " + how)
	}
	h.must("sync")
	h.Cut()
	h.plug()
	h.keepTime(web1, 20)
	h.records(web1)
	lap("the plug pulled")

	before := h.read(web1)["web1"]
	if out := h.apt("remove", "ftclock"); !strings.Contains(out, "\n    web1\n") {
		t.Errorf("a removal says nothing of the domain that runs:\n%q", out)
	}
	pauses := func() {
		h.must("sh", "-c", "for i in $(seq 20); do virsh -q suspend web1 && virsh -q resume web1 || exit 1; done")
	}
	pauses()
	h.must("systemctl", "restart", "libvirtd")
	pauses()
	h.apt("purge", "ftclock")
	pauses()
	check.Within(t, h.read(web1)["web1"].offset-before.offset, guest.MaxDrift, "removed and purged: drift")
	for range 2 { // as every other domain
		h.must("virsh", "destroy", "web1")
		h.must("virsh", "start", "web1")
	}
	if left := h.must("sh", "-c", "find / -xdev -iname '*ftclock*' -not -path '"+tools+"*' -not -path '/var/log/*' -not -path '/run/ftclock'"); strings.TrimSpace(left) != "" {
		t.Errorf("left behind: %s", left)
	}
	lap("removed and purged")
}

// deb is the package of a version's, the older one first.
func deb(n int) string { return tools + "/packages/" + packages.DebName(packages.Tags[n]) }

// apt runs apt-get on packages that are there, without a network.
func (h *host) apt(args ...string) string {
	h.t.Helper()
	out := h.must(append([]string{"apt-get", "-y", "-q", "--no-install-recommends", "--allow-downgrades", "-o", "APT::Sandbox::User=root"}, args...)...)
	return strings.ReplaceAll(out, "\r\n", "\n")
}

// upgraded does something to the host's packages under checkpoints, which have to go on. Whatever restarts libvirtd ends who makes
// them, so that begins again.
func (h *host) upgraded(what string, upgrade func()) {
	h.t.Helper()
	before := h.read([]string{"web1"})["web1"]
	stop := h.checkpointed("web1", 20)
	upgrade()
	if runs := stop(); runs == 0 {
		h.t.Errorf("%s upgraded: no checkpoints were made meanwhile", what)
	}
	// A client that was cut off may have left the guest paused.
	h.must("sh", "-c", "virsh domstate web1 | grep -q running || virsh resume web1")
	after := h.read([]string{"web1"})["web1"]
	h.t.Logf("%s upgraded: drift of %d ns", what, after.offset-before.offset)
	check.Within(h.t, after.offset-before.offset, guest.MaxDrift, "%s upgraded: drift", what)
}

// checkpointed makes checkpoints of a domain until it is told to stop, and gives how often it made so many without being cut off.
func (h *host) checkpointed(name string, many int) (stop func() int) {
	end := make(chan struct{})
	done := make(chan int)
	go func() {
		runs := 0
		for {
			select {
			case <-end:
				done <- runs
				return
			default:
				if _, err := h.Run("ftclock", "exercise", name, "--rate", "20", "--pause", "5", "--count", strconv.Itoa(many)); err == nil {
					runs++
				} else {
					time.Sleep(time.Second)
				}
			}
		}
	}()
	return func() int {
		close(end)
		return <-done
	}
}

// reinstallHypervisor installs libvirt's and QEMU's packages once more under what runs, from the files in the image.
func (h *host) reinstallHypervisor() {
	h.t.Helper()
	var names []string
	for line := range strings.Lines(h.must("dpkg-query", "-W", "-f", "${Package} ${Status}\n", "libvirt*", "qemu-system-x86*", "qemu-system-common*")) {
		if fields := strings.Fields(line); len(fields) == 4 && fields[3] == "installed" {
			names = append(names, fields[0])
		}
	}
	if len(names) < 4 {
		h.t.Fatalf("too few packages: %v", names)
	}
	h.apt(append([]string{"install", "--reinstall"}, names...)...)
}

// reboot has the host go down in an orderly way, and boots it again.
func (h *host) reboot() {
	h.t.Helper()
	if out, err := h.Run("sh", "-c", "systemctl reboot; sleep 900"); err == nil {
		h.t.Fatalf("the host doesn't go down: %s", out)
	}
	h.Cut()
	h.plug()
}

// denied checks that AppArmor, where it is in force, had no reason to deny anything.
func (h *host) denied(t *testing.T, when string) {
	t.Helper()
	out, _ := h.Run("sh", "-c", "journalctl --no-pager -k -g 'apparmor=.DENIED' -o cat | grep -i -e ftclock -e profile=.libvirt")
	if strings.TrimSpace(out) != "" {
		t.Errorf("AppArmor, at %s: %s", when, out)
	}
}
