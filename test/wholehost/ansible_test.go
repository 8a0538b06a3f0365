package wholehost

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/packages"
)

// play is an administrator's playbook, with a policy whose second file has this limit.
func play(limit string) string {
	return `- hosts: all
  gather_facts: false
  roles:
    - role: ftclock
      vars:
        ftclock_package: ` + tools + "/packages/" + packages.DebName(packages.Tags[0]) + `
        ftclock_policies:
          - name: 10-ha
            for:
              - {namespace: "http://openstack.org/xmlns/libvirt/nova/1.1", element: flavor, attribute: name, value: "ha.*"}
          - name: 20-lab
            for:
              - {name: "lab-*"}
              - {name: "a<b&c"}
            clock: {required: false}
            events:
              - {event: suspend, do: catch-up, limit: ` + limit + `}
          - name: 30-former
            state: absent
`
}

const labPolicy = `<!-- Ansible wrote this. -->
<policy xmlns="urn:ftclock:policy:1">
  <for name="lab-*"/>
  <for name="a&lt;b&amp;c"/>
  <clock xmlns="urn:ftclock:domain:1" required="no">
    <on event="suspend" do="catch-up" limit="5m"/>
  </clock>
</policy>
`

// The role on a host that has libvirt alone: a check changes nothing, the first run installs ftclock and restarts libvirtd once, the
// second changes nothing, and a policy that is wrong stays out.
func TestKVMAnsible(t *testing.T) {
	h := newHost(t, "ansible-core", "python3-apt")
	h.options.Read[filepath.Join(check.Value(built.Root())(t), "packaging/ansible")] = "/srv/ansible"
	h.plug()
	run := func(limit string, args ...string) (string, error) {
		if out, err := h.Feed([]byte(play(limit)), "tee", "/root/play.yml"); err != nil {
			t.Fatal(err, out)
		}
		out, err := h.Run(slices.Concat([]string{"env", "HOME=/root", "LC_ALL=C.UTF-8", "ANSIBLE_ROLES_PATH=/srv/ansible/roles", "ANSIBLE_NOCOLOR=1", "ANSIBLE_PIPELINING=1",
			"ansible-playbook", "-i", "localhost,", "-c", "local"}, args, []string{"/root/play.yml"})...)
		t.Logf("# %q %q: %v\n%s", limit, args, err, out)
		return out, err
	}
	recap := func(out, name string) string {
		if found := regexp.MustCompile(`\b` + name + `=(\d+)`).FindStringSubmatch(out); found != nil {
			return found[1]
		}
		return "nothing"
	}
	libvirtd := func() string {
		h.must("virsh", "list") // it runs, whether or not a socket had to start it
		return strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", "MainPID", "libvirtd"))
	}
	h.must("sh", "-c", "mkdir -p /etc/systemd/system/libvirtd.service.d && printf '[Service]\nEnvironment=LIBVIRTD_ARGS=\n' >/etc/systemd/system/libvirtd.service.d/stay.conf && systemctl daemon-reload && systemctl restart libvirtd")
	before := libvirtd()

	if out, err := run("5m", "--check"); err != nil || recap(out, "changed") == "0" {
		t.Errorf("a check of a host without ftclock: %v", err)
	}
	if out, err := h.Run("ls", "-d", "/usr/bin/ftclock", "/etc/ftclock", "/var/cache/ftclock"); err == nil || strings.Count(out, "No such file") != 3 {
		t.Errorf("a check changes the host: %s", out)
	}

	h.must("sh", "-c", "mkdir -p /etc/ftclock/policy.d && echo '<x/>' >/etc/ftclock/policy.d/30-former.xml")
	if _, err := run("5m"); err != nil {
		t.Fatal(err)
	}
	first := libvirtd()
	if first == before {
		t.Error("libvirtd wasn't restarted, and doesn't see the hook")
	}
	if got := h.must("cat", "/etc/ftclock/policy.d/20-lab.xml"); got != labPolicy {
		t.Errorf("the policy's second file is\n%s", got)
	}
	if got := strings.Fields(h.must("ls", "/etc/ftclock/policy.d")); !slices.Equal(got, []string{"10-ha.xml", "20-lab.xml"}) {
		t.Errorf("the policy has %q", got)
	}

	if out, err := run("5m"); err != nil || recap(out, "changed") != "0" {
		t.Errorf("the second run: %v, changed=%s", err, recap(out, "changed"))
	}
	if second := libvirtd(); second != first {
		t.Error("the second run restarts libvirtd")
	}

	if out, err := run("20m"); err == nil || !strings.Contains(out, "is too long") {
		t.Errorf("a policy that is wrong: %v", err)
	}
	if got := h.must("cat", "/etc/ftclock/policy.d/20-lab.xml"); got != labPolicy {
		t.Errorf("it replaces the one before:\n%s", got)
	}
	if left := strings.TrimSpace(h.must("find", os.TempDir(), "-name", "ftclock-policy.*")); left != "" {
		t.Errorf("left: %s", left)
	}
}
