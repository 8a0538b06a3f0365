package wholehost

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ftclock/test/built"
)

// What Debian's policy lacks for its own libvirt and QEMU. None of it is there for ftclock.
//
//go:embed testdata/debianlibvirt.te
var debianLibvirt []byte

// administrator is who the host's commands are run as: root's context after a login, in a shell, and not the kernel's.
var administrator = []string{"runcon", "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", "sh", "-c", `exec "$0" "$@"`}

// harmless are denials that are known, and no concern of ftclock's: libffi, below libvirt's libraries, tries execmem and does
// without; and virtlogd, whose log the policy doesn't let out.
var harmless = regexp.MustCompile(`\{ execmem \}.* comm="(virsh|ftclock)"|scontext=system_u:system_r:virtlogd_t:`)

// On a host whose SELinux enforces, with the policy module and Debian's reference policy: a start by metadata, a restart of
// libvirtd, enable --live, save and restore, and an upgrade. Nothing is denied. FTCLOCK_SELINUX=permissive lists what would be.
func TestKVMSELinux(t *testing.T) {
	h := newHost(t, "selinux-policy-default", "policycoreutils", "checkpolicy", "semodule-utils", "selinux-utils", "polkitd")
	h.label()
	enforcing := os.Getenv("FTCLOCK_SELINUX") != "permissive"
	h.options.Append = "security=selinux selinux=1 enforcing=1"
	if !enforcing {
		h.options.Append = "security=selinux selinux=1 enforcing=0"
	}
	h.plug()
	if mode := strings.TrimSpace(h.must("getenforce")); mode != "Enforcing" && enforcing {
		t.Fatalf("SELinux is %s", mode)
	}
	h.as = administrator
	h.install()
	h.must("sh", "-c", "restorecon -R /usr/sbin/ftclock-shim /usr/lib/systemd/system/ftclock-shim@.service /run/ftclock; systemctl daemon-reload")
	before := h.denials()
	h.known = len(before)
	t.Logf("denied before any domain was started: %s", strings.Join(before, "\n"))

	web1 := []string{"web1"}
	h.define("web1")
	h.must("virsh", "start", "web1")
	for what, pid := range map[string]string{"shim": h.property(h.unit("web1"), "MainPID"), "QEMU": h.must("cat", "/run/libvirt/qemu/web1.pid")} {
		context := h.must("cat", "/proc/"+strings.TrimSpace(pid)+"/attr/current")
		t.Logf("%s runs as %s", what, context)
		if want := map[string]string{"shim": ":virtd_t:", "QEMU": ":svirt_t:"}[what]; !strings.Contains(context, want) {
			t.Errorf("%s runs as %s, want a context with %s", what, context, want)
		}
	}
	h.keepTime(web1, 20)
	h.allowed("a start")

	h.must("systemctl", "restart", "libvirtd")
	h.keepTime(web1, 20)
	h.allowed("libvirtd's restart")

	h.must("systemctl", "kill", "-s", "KILL", h.unit("web1"))
	h.keepTime(web1, 20)
	h.allowed("a kill of the shim")

	h.must("virsh", "save", "web1", "/var/lib/libvirt/qemu/save/web1")
	h.must("virsh", "restore", "/var/lib/libvirt/qemu/save/web1")
	h.keepTime(web1, 20)
	h.allowed("save and restore")

	h.upgraded("ftclock", func() { h.must("dpkg", "-i", deb(1)) })
	h.keepTime(web1, 20)
	h.allowed("an upgrade")

	h.must("sh", "-c", "virsh dumpxml --inactive web1 | sed -e 's/web1/web2/g' -e '/<uuid>/d' -e '/<metadata>/,/<\\/metadata>/d' >/root/web2.xml && virsh define /root/web2.xml && virsh start web2")
	h.must("ftclock", "enable", "--live", "web2")
	h.keepTime([]string{"web1", "web2"}, 20)
	h.must("systemctl", "start", "ftclock-anchor.service")
	h.allowed("enable --live, and the anchor's unit")
	if out, err := h.Run("ftclock", "doctor"); err != nil {
		t.Errorf("doctor: %v\n%s", err, out)
	}
	h.allowed("the doctor")
}

// label makes the host's disk: a copy of the image with the contexts of its policy, which a read-only image can't have, with the policy
// module in it.
func (h *host) label() {
	h.t.Helper()
	root, err := built.Root()
	if err != nil {
		h.t.Fatal(err)
	}
	tree := filepath.Join(filepath.Dir(h.options.Disk), "tree")
	upper := filepath.Join(tree, "upper")
	if err := os.Mkdir(tree, 0o755); err != nil {
		h.t.Fatal(err)
	}
	do := func(args ...string) {
		h.t.Helper()
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")
		if out, err := cmd.CombinedOutput(); err != nil {
			h.t.Fatalf("labelling the host's disk: %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	do("cp", "-a", h.options.Image, upper)
	do("cp", filepath.Join(root, "packaging/selinux/ftclock.te"), filepath.Join(root, "packaging/selinux/ftclock.fc"), upper+"/root")
	if err := os.WriteFile(upper+"/root/debianlibvirt.te", debianLibvirt, 0o600); err != nil {
		h.t.Fatal(err)
	}
	const inside = `set -e
cd /root
for name in ftclock debianlibvirt; do
    touch $name.fc
    checkmodule -M -m -o $name.mod $name.te
    semodule_package -o $name.pp -m $name.mod -f $name.fc
done
semodule -n -i ftclock.pp debianlibvirt.pp
setfiles -F -e /proc /etc/selinux/default/contexts/files/file_contexts /`
	do("unshare", "-m", "sh", "-c", `mount -t proc proc "$1/proc" && exec chroot "$1" sh -c "$2"`, "label", upper, inside)
	do("mkfs.ext4", "-q", "-F", "-d", tree, h.options.Disk, "4G")
	if err := os.RemoveAll(tree); err != nil {
		h.t.Fatal(err)
	}
}

// denials are what SELinux has denied so far, a line each.
func (h *host) denials() []string {
	h.t.Helper()
	out, _ := h.Run("sh", "-c", "journalctl --no-pager -k -o cat | grep 'avc: *denied'") // none is an error of grep's
	var all []string
	for line := range strings.Lines(out) {
		all = append(all, strings.TrimSpace(line))
	}
	return all
}

// allowed checks that SELinux has denied nothing since the last time, from the start of the first domain on.
func (h *host) allowed(what string) {
	h.t.Helper()
	all := h.denials()
	for _, line := range all[min(h.known, len(all)):] {
		if !harmless.MatchString(line) {
			h.t.Errorf("denied at %s: %s", what, line)
		}
	}
	h.known = len(all)
}
