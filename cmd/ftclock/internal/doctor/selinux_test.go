package doctor

import (
	"fmt"
	"strings"
	"testing"
)

// The answers are those of a made-up policy, in the kernel's format; the questions have to be the kernel's as well.
func TestSELinux(t *testing.T) {
	const init, daemon, file, shim = "system_u:system_r:init_t:s0", "system_u:system_r:virtqemud_t:s0", "system_u:object_r:virtd_exec_t:s0", "system_u:system_r:virtd_t:s0"
	host := func(enforce string) examined {
		files := map[string]string{selinuxfs + "enforce": enforce, "/proc/1/attr/current": init + "\x00", "/proc/1/comm": "systemd\n",
			"/proc/7/comm": "virtqemud\n", "/proc/7/attr/current": daemon + "\x00"}
		for class, permissions := range map[string][]string{"process": {"fork", "ptrace"}, "file": {"read", "write", "open", "map"}, "unix_stream_socket": {"connectto"}} {
			files[selinuxfs+"class/"+class+"/index"] = map[string]string{"process": "2", "file": "6", "unix_stream_socket": "22"}[class]
			for i, permission := range permissions {
				files[selinuxfs+"class/"+class+"/perms/"+permission] = fmt.Sprint(i + 1)
			}
		}
		return hostWith(t, files)
	}
	all := map[string]string{
		shim + " " + svirt + " 2":       "2 ffffffff 0 ffffffff 1 0",
		shim + " " + svirt + " 6":       "7 ffffffff 0 ffffffff 1 0",
		shim + " " + svirtTmpfs + " 6":  "f ffffffff 0 ffffffff 1 0",
		svirt + " " + svirtTmpfs + " 6": "f ffffffff 0 ffffffff 1 0",
		daemon + " " + shim + " 22":     "1 ffffffff 0 ffffffff 1 0",
	}
	for name, c := range map[string]struct {
		enforce  string
		question string // that is answered otherwise
		answer   string
		want     grade
		what     string
	}{
		"permissive":            {"0", "", "", good, "SELinux is permissive"},
		"allowed":               {"1", "", "", good, "its policy lets the shim work, as virtd_t"},
		"no ptrace":             {"1", shim + " " + svirt + " 2", "1 ffffffff 0 ffffffff 1 0", bad, "work: virtd_t may not ptrace svirt_t:process"},
		"no page":               {"1", shim + " " + svirtTmpfs + " 6", "1 ffffffff 0 ffffffff 1 0", bad, "virtd_t may not open, write, map svirt_tmpfs_t:file"},
		"no page in QEMU":       {"1", svirt + " " + svirtTmpfs + " 6", "7 ffffffff 0 ffffffff 1 0", bad, "svirt_t may not map svirt_tmpfs_t:file"},
		"virtqemud, not let in": {"1", daemon + " " + shim + " 22", "0 ffffffff 0 ffffffff 1 0", bad, "virtqemud_t may not connectto virtd_t:unix_stream_socket"},
		"a permissive domain":   {"1", daemon + " " + shim + " 22", "0 ffffffff 0 ffffffff 1 1", good, "lets the shim work"},
		"nonsense":              {"1", shim + " " + svirt + " 6", "what?", warn, `the policy answers "what?"`},
	} {
		t.Run(name, func(t *testing.T) {
			s := selinux{examined: host(c.enforce), transact: func(path, question string) (string, error) {
				switch {
				case strings.HasSuffix(path, "/create") && question == init+" "+file+" 2":
					return shim, nil
				case strings.HasSuffix(path, "/access") && question == c.question:
					return c.answer, nil
				case strings.HasSuffix(path, "/access") && all[question] != "":
					return all[question], nil
				}
				return "", fmt.Errorf("nobody asks %s for %q", path, question)
			}}
			wantFinding(t, s.check(file), c.want, c.what)
		})
	}
}
