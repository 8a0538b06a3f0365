package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// libvirt's own profiles take ours in, and allow already what packaging/apparmor/ftclock says that they do.
func TestAppArmor(t *testing.T) {
	parser := need(t, "apparmor_parser", "apparmor")
	const installed = "/etc/apparmor.d"
	for _, file := range []string{"usr.sbin.libvirtd", "abstractions/libvirt-qemu", "libvirt/TEMPLATE.qemu"} {
		if _, err := os.Stat(filepath.Join(installed, file)); err != nil {
			t.Fatal("libvirt's profiles aren't here: apt-get install libvirt-daemon-system: ", err)
		}
	}
	dir := filepath.Join(t.TempDir(), "apparmor.d")
	run(t, ".", nil, "cp", "-a", installed, dir)
	run(t, ".", nil, "mkdir", "-p", dir+"/abstractions/libvirt-qemu.d", dir+"/local/abstractions")
	run(t, ".", nil, "touch", dir+"/local/usr.sbin.libvirtd", dir+"/local/abstractions/libvirt-qemu")

	template, err := os.ReadFile(dir + "/libvirt/TEMPLATE.qemu")
	if err != nil {
		t.Fatal(err)
	}
	// The way virt-aa-helper makes a domain's profile of the template. Older abstractions don't look into the directory.
	profile := strings.Replace(string(template), "LIBVIRT_TEMPLATE", "libvirt-d9c5a2f4-51f7-4b9b-8d8c-2f7d0b6b9b6e", 1)
	const include = "#include <abstractions/libvirt-qemu>"
	if !strings.Contains(profile, include) {
		t.Fatalf("the template has changed:\n%s", profile)
	}
	without := filepath.Join(dir, "libvirt/without")
	with := filepath.Join(dir, "libvirt/with")
	ours := strings.Replace(profile, include, include+"\n  #include <abstractions/libvirt-qemu.d/ftclock>", 1)
	if err := os.WriteFile(without, []byte(profile), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(with, []byte(ours), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, ".", nil, "cp", "apparmor/ftclock", dir+"/abstractions/libvirt-qemu.d/ftclock")

	expand := func(file string) string {
		run(t, ".", nil, parser, "-Q", "-K", "--base", dir, file) // compiles it
		return run(t, ".", nil, parser, "-p", "-Q", "-K", "--base", dir, file)
	}
	rule := regexp.MustCompile(`(?m)^\s*/usr/lib/ftclock/libftclock-qemu\.so mr,$`)
	if text := expand(with); !rule.MatchString(text) {
		t.Error("our rule isn't in the profile")
	}
	for what, c := range map[string]struct{ file, rule string }{
		"QEMU maps libraries below /usr/lib":        {without, `(?m)^\s*/\{usr/,\}lib\{,32,64\}/\*\*\.so\*\s+mr,$`},
		"libvirtd runs programs in sbin unconfined": {dir + "/usr.sbin.libvirtd", `(?m)^\s*/usr/sbin/\* PUx,$`},
	} {
		if !regexp.MustCompile(c.rule).MatchString(expand(c.file)) {
			t.Errorf("libvirt's profiles don't say any more: %s", what)
		}
	}
}

// The policy module is one. In the long form: with it, Debian's reference policy allows libvirtd's domain all that the shim does.
func TestSELinux(t *testing.T) {
	checkmodule := need(t, "checkmodule", "checkpolicy")
	dir := t.TempDir()
	run(t, ".", nil, checkmodule, "-M", "-m", "-o", dir+"/ftclock.mod", "selinux/ftclock.te")
	run(t, ".", nil, need(t, "semodule_package", "semodule-utils"), "-o", dir+"/ftclock.pp", "-m", dir+"/ftclock.mod", "-f", "selinux/ftclock.fc")

	if !long {
		return
	}
	// The package isn't installed: its scripts would build a policy for the machine.
	cmd := exec.Command(need(t, "apt-get", "apt"), "download", "selinux-policy-default")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("apt-get download: %v\n%s", err, out)
	}
	const link = `set -e
dpkg-deb -x selinux-policy-default_*.deb .
mv usr/share/selinux/default modules
bunzip2 modules/*.bz2
semodule_link -o linked modules/base.pp $(ls modules/*.pp | grep -v /base.pp) ftclock.pp >/dev/null
semodule_expand linked policy >/dev/null`
	run(t, dir, []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin"}, "sh", "-c", link)

	files, err := os.ReadFile("selinux/ftclock.fc")
	if err != nil {
		t.Fatal(err)
	}
	for _, context := range regexp.MustCompile(`object_r:(\w+)`).FindAllStringSubmatch(string(files), -1) {
		run(t, dir, nil, need(t, "sesearch", "setools"), "-A", "-t", context[1], "policy") // fails where there is no such type
	}

	for _, c := range []struct{ target, class, permissions, why string }{
		{"svirt_t", "process", "ptrace", "loads the module"},
		{"svirt_t", "dir", "search read open", "looks into /proc/PID"},
		{"svirt_t", "file", "read write open", "/proc/PID/mem"},
		{"svirt_t", "lnk_file", "read", "/proc/PID/fd"},
		{"svirt_t", "unix_stream_socket", "connectto", "QEMU's monitor"},
		{"svirt_tmpfs_t", "file", "read write map open", "the clock page"},
		{"svirt_image_t", "dir", "write add_name remove_name search", "the domain's directory"},
		{"svirt_image_t", "sock_file", "create write rename unlink", "the monitor's sockets"},
		{"virtd_t", "unix_stream_socket", "connectto listen accept", "libvirtd connects to it"},
		{"virtd_t", "capability", "sys_ptrace dac_override", ""},
		{"virtd_t", "capability2", "checkpoint_restore", "/proc/PID/map_files"},
		{"virtd_t", "process", "sigstop sigkill", "ends keeper and shim"},
		{"virt_tmpfs_t", "file", "read write map", "what one shim leaves to the next"},
		{"init_t", "unix_dgram_socket", "sendto", "tells systemd"},
		{"svirt_image_t", "fifo_file", "read write", "carries a save's pipe"},
		{"init_t", "dbus", "send_msg", "the hook asks systemd"},
		{"virtd_exec_t", "file", "execute execute_no_trans entrypoint map read", "the keeper starts the shim"},
		{"ftclock_run_t", "dir", "create write add_name remove_name rmdir", "/run/ftclock"},
		{"ftclock_run_t", "sock_file", "create write unlink", "control.sock"},
		{"ftclock_unit_t", "service", "start status", "the hook has systemd start the unit"},
		{"virt_var_lib_t", "file", "create write rename unlink", "/var/lib/ftclock"},
		{"virt_log_t", "file", "create append open", "/var/log/ftclock"},
	} {
		rules := run(t, dir, nil, need(t, "sesearch", "setools"), "-A", "-s", "virtd_t", "-t", c.target, "-c", c.class, "policy")
		allowed := strings.Join(strings.FieldsFunc(rules, func(r rune) bool { return strings.ContainsRune("{};\n ", r) }), " ") + " "
		for _, permission := range strings.Fields(c.permissions) {
			if !strings.Contains(allowed, " "+permission+" ") {
				t.Errorf("virtd_t may not %s %s:%s (%s)\n%s", permission, c.target, c.class, c.why, rules)
			}
		}
	}
	for what, class := range map[string]string{"fd": "use", "fifo_file": "read write", "unix_stream_socket": "read write"} {
		rules := run(t, dir, nil, "sesearch", "-A", "-s", "init_t", "-t", "virtd_t", "-c", what, "policy")
		for _, permission := range strings.Fields(class) {
			if !strings.Contains(rules, permission) {
				t.Errorf("systemd can't hold the shim's descriptors: no %s of a %s\n%s", permission, what, rules)
			}
		}
	}
	if rules := run(t, dir, nil, "sesearch", "-T", "-s", "init_t", "-t", "virtd_exec_t", "policy"); !strings.Contains(rules, ":process virtd_t;") {
		t.Errorf("systemd starts it in another domain:\n%s", rules)
	}
	for what, target := range map[string]string{"the module": "lib_t", "the clock page": "svirt_tmpfs_t"} {
		if rules := run(t, dir, nil, "sesearch", "-A", "-s", "svirt_t", "-t", target, "-c", "file", "policy"); !strings.Contains(rules, "map") {
			t.Errorf("QEMU can't map %s:\n%s", what, rules)
		}
	}
}
