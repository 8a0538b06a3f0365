package hypervisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/ui"
)

// aliasesFile has what libvirt's language allows.
const aliasesFile = `# uri_aliases = [ "commented=qemu:///no" ]
uri_default = "qemu:///system"; number = -1
uri_aliases = [
  "node1=qemu+ssh://root@node1.example/system",
  'node-2=qemu+ssh://root@node2.example/system?keyfile=/k&no_verify=1',
  """mock=test:///default""",
]
uri_aliases = [ "late=test:///default" ]
`

func TestAlias(t *testing.T) {
	path := filepath.Join(t.TempDir(), "libvirt.conf")
	look := func(text, alias string) (string, error) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return aliasIn(path, alias)
	}
	for alias, want := range map[string]string{
		"node1": "qemu+ssh://root@node1.example/system", "node-2": "qemu+ssh://root@node2.example/system?keyfile=/k&no_verify=1", "mock": "test:///default",
	} {
		if got, err := look(aliasesFile, alias); got != want || err != nil {
			t.Errorf("%s: %q, %v", alias, got, err)
		}
	}
	for text, want := range map[string]string{
		aliasesFile:                          "neither a URI nor an alias in " + path,
		"":                                   "neither a URI nor an alias in " + path,
		"uri_aliases = [ ]":                  "neither a URI nor an alias in " + path,
		`uri_aliases = "other=test:///x"`:    "neither a URI nor an alias in " + path,
		`uri_aliases = [ "a b=test:///x" ]`:  `the entry "a b=test:///x"`,
		`uri_aliases = [ "commented" ]`:      `the entry "commented"`,
		`uri_aliases = [ 7 ]`:                "has 7 in it",
		`uri_aliases = [ "x=y"`:              "isn't closed",
		"a = 1\nb = 2\nuri_aliases = [ \"x ": "line 3 isn't understood",
		strings.Repeat("#", maxConf+1):       "is longer than",
	} {
		if got, err := look(text, "commented"); err == nil || !strings.Contains(err.Error(), want) || ui.HintOf(err) == "" {
			t.Errorf("%.40q: %q, %v, want %q and a hint", text, got, err, want)
		}
	}
	if _, err := aliasIn(filepath.Join(t.TempDir(), "none"), "a"); err == nil || !strings.Contains(err.Error(), "neither") {
		t.Error(err)
	}
}

// nobody is a user who isn't root.
const nobody = 65534

// asUser runs the test once more as nobody, with a configuration directory of its own, and tells whether this is that run.
func asUser(t *testing.T) bool {
	t.Helper()
	if os.Getenv("FTCLOCK_AS_USER") != "" {
		return true
	}
	home, err := os.MkdirTemp("", "config")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "FTCLOCK_AS_USER=1", "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_RUNTIME_DIR="+home, "XDG_CACHE_HOME="+home)
	cmd.Dir = "/"
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		err = os.Chown(home, nobody, nobody)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// libvirt itself finds the same in the same file. It takes root's from /etc, which is none of a test's: so a user asks it.
func TestAliasIsLibvirts(t *testing.T) {
	if !asUser(t) {
		return
	}
	dir := filepath.Join(os.Getenv("XDG_CONFIG_HOME"), "libvirt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "libvirt.conf"), []byte(aliasesFile), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Alias("mock")
	conn, theirs := libvirt.NewConnect("mock")
	if err != nil || theirs != nil {
		t.Fatal(err, theirs)
	}
	defer conn.Close()
	if uri, err := conn.GetURI(); err != nil || uri != got {
		t.Errorf("libvirt has %q, %v, and Alias %q", uri, err, got)
	}
	if _, err := libvirt.NewConnect("late"); err == nil {
		t.Error("libvirt takes the second of two settings")
	}
}
