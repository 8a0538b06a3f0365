// Package packaging has tests alone: of what makes the packages, and of what goes into them.
package packaging

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/packages"
	"ftclock/test/privatelibvirt"
)

// long asks for what make test-packages does and make test leaves to it: minutes.
var long = os.Getenv("FTCLOCK_LONG") == "1"

// need finds a program of a Debian package's.
func need(t *testing.T, program, debian string) string {
	t.Helper()
	for _, name := range []string{program, "/usr/sbin/" + program} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	privatelibvirt.LeaveOut(t, "no "+program+": apt-get install "+debian)
	return ""
}

// run runs a command in a directory, with further environment, and fails the test with its output.
func run(t *testing.T, dir string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// build makes the packages of a checkout, with further environment.
func build(t *testing.T, name string, env ...string) packages.Files {
	t.Helper()
	need(t, "dpkg-shlibdeps", "dpkg-dev")
	need(t, "checkmodule", "checkpolicy")
	files, err := packages.Build("..", filepath.Join(t.TempDir(), name), "v1.2.3", env...)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// Two builds of one commit are the same bytes, wherever and whenever they are made, and the distributions' own checkers
// find no error in them. In the long form the second build compiles everything anew.
func TestPackages(t *testing.T) {
	first := build(t, "here")
	env := []string{"TZ=Asia/Taipei", "LC_ALL=C.UTF-8"}
	if long {
		env = append(env, "GOCACHE="+t.TempDir())
	}
	second := build(t, "somewhere-else", env...)
	for kind, path := range first {
		a, err := os.ReadFile(path)
		b, err2 := os.ReadFile(second[kind])
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("two builds of the %s differ: %s\n%s", kind, path, second[kind])
		}
		t.Logf("%s: %d bytes", kind, len(a))
	}

	out, err := exec.Command(need(t, "lintian", "lintian"), "--allow-root", "--fail-on", "error,warning", first["deb"]).CombinedOutput()
	if err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
	// rpmlint unpacks with a plain cpio, which would put nfpm's absolute names into the machine's own /etc and /usr.
	dir := t.TempDir()
	cpio := "#!/bin/sh\nexec " + need(t, "cpio", "cpio") + ` --no-absolute-filenames "$@"` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "cpio"), []byte(cpio), 0o755); err != nil {
		t.Fatal(err)
	}
	lint := exec.Command(need(t, "rpmlint", "rpmlint"), "--strict", "-c", "rpmlint.toml", first["rpm"])
	lint.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	out, err = lint.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "packages: 1") {
		t.Errorf("rpmlint: %v\n%s", err, out)
	}

	// The command line is the only one that needs libraries, and Debian 12's are enough.
	depends := strings.TrimSpace(run(t, ".", nil, "dpkg-deb", "-f", first["deb"], "Depends"))
	if !strings.Contains(depends, "libc6 (>= ") || !strings.Contains(depends, "libvirt0 (>= ") {
		t.Errorf("the .deb depends on %q", depends)
	}
	requires := run(t, ".", nil, "rpm", "-qp", "--requires", first["rpm"])
	if !strings.Contains(requires, "libvirt.so.0()(64bit)\n") || !strings.Contains(requires, "libc.so.6()(64bit)\n") {
		t.Errorf("the .rpm requires:\n%s", requires)
	}

	// What an operator has changed isn't overwritten.
	const logrotate = "/etc/logrotate.d/ftclock\n"
	if files := run(t, ".", nil, "dpkg-deb", "-I", first["deb"], "conffiles"); !strings.Contains(files, logrotate) {
		t.Errorf("the .deb's configuration files:\n%s", files)
	}
	if files := run(t, ".", nil, "rpm", "-qp", "--configfiles", first["rpm"]); !strings.Contains(files, logrotate) {
		t.Errorf("the .rpm's configuration files:\n%s", files)
	}

	// Both families have the same files, but for what only one of them knows.
	only := map[string]string{
		"/usr/share/doc/ftclock/changelog.Debian.gz": "deb", "/usr/share/doc/ftclock/copyright": "deb",
		"/usr/share/doc/ftclock/third-party-licenses.gz": "deb", "/usr/share/licenses/ftclock/third-party-licenses.gz": "rpm",
		"/usr/share/licenses/ftclock/LICENSE": "rpm", "/usr/share/lintian/overrides/ftclock": "deb",
		"/etc/apparmor.d/abstractions/libvirt-qemu.d/ftclock": "deb", "/usr/share/selinux/packages/ftclock.pp": "rpm",
		"/usr/share/zsh/vendor-completions/_ftclock": "deb", "/usr/share/zsh/site-functions/_ftclock": "rpm",
	}
	in := map[string]map[string]bool{"deb": {}, "rpm": {}}
	for _, line := range strings.Split(run(t, ".", nil, "dpkg-deb", "-c", first["deb"]), "\n") {
		if fields := strings.Fields(line); len(fields) > 5 && !strings.HasSuffix(fields[5], "/") {
			in["deb"][strings.TrimPrefix(fields[5], ".")] = true
		}
	}
	for _, line := range strings.Split(run(t, ".", nil, "rpm", "-qp", "--qf", "[%{FILEMODES:perms} %{FILENAMES}\n]", first["rpm"]), "\n") {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0][0] != 'd' {
			in["rpm"][fields[1]] = true
		}
	}
	other := map[string]string{"deb": "rpm", "rpm": "deb"}
	for kind, files := range in {
		if len(files) < 20 {
			t.Errorf("the %s has only %d files", kind, len(files))
		}
		for path := range files {
			if only[path] == "" && !in[other[kind]][path] {
				t.Errorf("%s is in the %s alone", path, kind)
			}
		}
	}
	for path, kind := range only {
		if !in[kind][path] || in[other[kind]][path] {
			t.Errorf("%s should be in the %s alone", path, kind)
		}
	}
}

func TestManPages(t *testing.T) {
	mandoc := need(t, "mandoc", "mandoc")
	pages, err := filepath.Glob("man/*.[158]")
	if err != nil || len(pages) != 4 {
		t.Fatal(pages, err)
	}
	for _, page := range pages {
		if out, err := exec.Command(mandoc, "-Tlint", "-Wwarning", page).CombinedOutput(); err != nil {
			t.Errorf("mandoc: %v\n%s", err, out)
		}
		cmd := exec.Command(need(t, "man", "man-db"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page)
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANROFFSEQ=")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil || stderr.Len() > 0 {
			t.Errorf("man: %v\n%s", err, stderr.String())
		}
	}
}

// scripted runs a maintainer's script with a /proc and a /run of its own, and tells what it prints and asks systemctl for.
func scripted(t *testing.T, root, script, call string) (out, asked string) {
	t.Helper()
	text, err := os.ReadFile("scripts/" + script)
	if err != nil {
		t.Fatal(err)
	}
	moved := strings.NewReplacer("/proc", root+"/proc", "/run/", root+"/run/", "/var/", root+"/var/", "/etc/", root+"/etc/").Replace(string(text))
	log := filepath.Join(root, "asked")
	_ = os.Remove(log)
	cmd := exec.Command("sh", "-c", moved, script, call)
	cmd.Env = append(os.Environ(), "PATH="+root+"/bin:"+os.Getenv("PATH"), "ASKED="+log)
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", script, call, err, said)
	}
	lines, _ := os.ReadFile(log)
	return string(said), strings.ReplaceAll(string(lines), "--system ", "")
}

// rpm calls the scripts with the number of versions that will be there: 1 at an installation, 2 and 1 at an upgrade, 0 at a removal. A
// shim is known by its file, in /usr/bin where /usr/sbin is a link to that.
func TestScriptsUnderRPM(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("bin/systemctl", "#!/bin/sh\necho \"$@\" >>\"$ASKED\"\n", 0o755)
	process := func(pid, exe, namespace, id, name string) {
		args := strings.Join([]string{exe, id, ""}, "\x00")
		if name == "keeper" {
			args = strings.Join([]string{exe, "-keeper", id, ""}, "\x00")
		} else {
			write("run/ftclock/"+id+"/shim.json", `{"name":"`+name+`","uuid":"`+id+`","mode":"relay"}`+"\n", 0o600)
		}
		write("proc/"+pid+"/cmdline", args, 0o644)
		write("proc/"+pid+"/comm", "ftclock-shim\n", 0o644)
		write("proc/"+pid+"/ns/none", "", 0o644)
		if err := errors.Join(os.Symlink(exe, filepath.Join(root, "proc", pid, "exe")), os.Symlink(namespace, filepath.Join(root, "proc", pid, "ns/pid"))); err != nil {
			t.Fatal(err)
		}
	}
	// No pid is as large as these.
	process("50000001", "/usr/sbin/ftclock-shim", "pid:[1]", "1", "debian")
	process("50000002", "/usr/bin/ftclock-shim", "pid:[1]", "2", "fedora")
	process("50000003", "/usr/bin/ftclock-shim (deleted)", "pid:[1]", "3", "earlier")
	process("50000004", "/usr/bin/ftclock-shim", "pid:[1]", "2", "keeper")
	process("50000005", "/usr/bin/ftclock-shim", "pid:[2]", "5", "container")
	process("50000006", "/home/me/bin/ftclock-shim", "pid:[1]", "6", "mine")
	write("proc/self/none", "", 0o644)
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o755), os.MkdirAll(filepath.Join(root, "proc/self/ns"), 0o755),
		os.Symlink("pid:[1]", filepath.Join(root, "proc/self/ns/pid"))); err != nil {
		t.Fatal(err)
	}
	const restart = "--quiet is-enabled ftclock-anchor.timer\nrestart ftclock-anchor.timer\n" +
		"--quiet is-enabled ftclock-exporter.socket\nrestart ftclock-exporter.socket\n" +
		"--quiet is-enabled ftclock-exporter.service\nrestart ftclock-exporter.service\n" +
		"--quiet is-enabled ftclock-node.service\nrestart ftclock-node.service\n"
	const all = "ftclock-exporter.socket ftclock-exporter.service ftclock-node.service ftclock-anchor.timer\n"
	for _, c := range []struct{ script, call, out, asked string }{
		{"postinst", "1", "", "daemon-reload\n--quiet preset ftclock-anchor.timer\n" + restart},
		{"postinst", "2", "", "daemon-reload\n" + restart},
		{"prerm", "1", "", ""},
		{"postrm", "1", "", ""},
		{"prerm", "0", "ftclock: these domains run and are served until they stop; their next start is uncorrected:\n    debian\n    earlier\n    fedora\n",
			"stop " + all + "--quiet disable " + all},
		{"postrm", "0", "", "daemon-reload\n"},
	} {
		if out, asked := scripted(t, root, c.script, c.call); out != c.out || asked != c.asked {
			t.Errorf("%s %s prints %q, want %q; asks systemctl for %q, want %q", c.script, c.call, out, c.out, asked, c.asked)
		}
	}
	write("run/ftclock/a/shim.json", "", 0o600)
	write("var/lib/ftclock/a/record", "", 0o600)
	if scripted(t, root, "postrm", "purge"); exists(filepath.Join(root, "run/ftclock")) || exists(filepath.Join(root, "var/lib/ftclock")) {
		t.Error("a purge leaves state")
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// The maintainers' scripts are the shell's of any distribution, and do nothing for the calls that are none of theirs.
func TestMaintainerScripts(t *testing.T) {
	for _, script := range []string{"scripts/postinst", "scripts/prerm", "scripts/postrm", "build"} {
		if out, err := exec.Command(need(t, "shellcheck", "shellcheck"), "--shell=sh", script).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	for script, calls := range map[string][]string{
		"postinst": {"abort-upgrade", "abort-remove", "abort-deconfigure", "triggered"},
		"prerm":    {"upgrade", "failed-upgrade", "deconfigure", "1"},
		"postrm":   {"upgrade", "failed-upgrade", "abort-install", "abort-upgrade", "disappear", "1"},
	} {
		for _, call := range calls {
			if out, err := exec.Command("sh", "scripts/"+script, call, "1.2.3-1").CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%s %s: %v\n%s", script, call, err, out)
			}
		}
	}
}
