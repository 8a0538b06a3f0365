// Package docs runs the commands of the documentation, in a private libvirt with a domain web1, as a reader would. For what
// can be checked without a KVM host see package pages.
package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

const repo = "../.."

var (
	conn *libvirt.Connect
	elf  string
)

func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(privatelibvirt.WithGuest(&conn, &elf, m.Run), privatelibvirt.Installed("../..")))
}

// elsewhere are the commands that aren't run here, with the reason, and who runs them.
var elsewhere = map[string]string{
	"make demo":                  "it makes a private libvirt of its own: TestKVMDemo runs its code, with fewer checkpoints",
	"make test":                  "it runs this",
	"make install":               "the machine's own files: privatelibvirt.Install runs it in here",
	"make packages":              "packaging's tests build them",
	"systemctl restart libvirtd": "there is no systemd: test/packages and test/systemd do it in a container",
	"ftclock watch":              "it wants a terminal: TestWatch in cmd/ftclock types its keys in tmux",
	"virt-install … --xml ./metadata/clock/@xmlns=urn:ftclock:domain:1":                                "its other arguments are the reader's: test/e2e runs it with some",
	"systemctl status 'ftclock-shim@*'":                                                                "there is no systemd: test/systemd asks one in a container",
	"journalctl -u ftclock-shim@$(virsh domuuid web1)":                                                 "there is no systemd: test/systemd reads a journal in a container",
	"systemctl show -P NFileDescriptorStore ftclock-shim@$(virsh domuuid web1)":                        "there is no systemd: test/wholehost counts them",
	"systemctl reload 'ftclock-shim@*'":                                                                "there is no systemd: test/systemd reloads in a container",
	"apt-get install ./build/packages/ftclock_*.deb":                                                   "the machine's own packages: test/packages installs in a container",
	"dnf install ./build/packages/ftclock-*.rpm":                                                       "there is no Fedora: packaging's tests look into the .rpm",
	"apt-get install ./ftclock_NEW.deb":                                                                "the machine's own packages: test/packages upgrades in a container",
	"apt-get install --allow-downgrades ./ftclock_OLD.deb":                                             "the machine's own packages: test/packages downgrades in a container",
	"apt-get remove ftclock":                                                                           "the machine's own packages: test/packages removes in a container",
	"apt-get purge ftclock":                                                                            "the machine's own packages: test/packages purges in a container",
	"semodule -i /usr/share/selinux/packages/ftclock.pp":                                               "SELinux is not active in this kernel: packaging's tests compile the module",
	"restorecon -Rv /usr/sbin/ftclock-shim /usr/lib/systemd/system/ftclock-shim@.service /run/ftclock": "SELinux is not active in this kernel",
}

// command is a line of a block of commands.
type command struct{ file, text string }

// commands are the lines of a page's fenced blocks that have no language, or sh.
func commands(t *testing.T, file string) (all []command) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repo, file))
	if err != nil {
		t.Fatal(err)
	}
	inside, ours := false, false
	comment := regexp.MustCompile(`(^|\s+)#.*$`)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if language, fence := strings.CutPrefix(strings.TrimSpace(line), "```"); fence {
			inside = !inside
			ours = inside && (language == "" || language == "sh")
			continue
		}
		if line = comment.ReplaceAllString(line, ""); ours && strings.TrimSpace(line) != "" {
			all = append(all, command{file, strings.TrimSpace(line)})
		}
	}
	return all
}

func pages(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(repo, "docs/*.md"))
	if err != nil || len(found) == 0 {
		t.Fatal("no pages", err)
	}
	all := []string{"README.md"}
	for _, path := range found {
		all = append(all, "docs/"+filepath.Base(path))
	}
	return all
}

// Each page's commands work, from top to bottom, on a domain web1: defined and off where the page enables it, else enabled and running.
func TestKVMCommandsOfThePages(t *testing.T) {
	for _, page := range pages(t) {
		t.Run(strings.TrimSuffix(page, ".md"), func(t *testing.T) {
			var here []command
			for _, c := range commands(t, page) {
				if elsewhere[c.text] == "" {
					here = append(here, c)
				}
			}
			if len(here) == 0 {
				return
			}
			x := privatelibvirt.GuestXML("web1", elf)
			began := strings.Contains(join(here), "ftclock enable")
			if !began { // the page is for who has enabled it already
				x.Metadata = &libvirtxml.DomainMetadata{XML: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`}
			}
			d, err := privatelibvirt.Define(conn, x)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if t.Failed() {
					t.Log(privatelibvirt.Log("web1"))
				}
				if err := d.Remove(); err != nil {
					t.Error(err)
				}
			}()
			if !began {
				if err := d.Create(); err != nil {
					t.Fatal(err)
				}
				moving(t, d)
			}
			dir := t.TempDir()
			for _, c := range here {
				cmd := exec.Command("bash", "-euc", c.text)
				cmd.Dir = dir
				cmd.Env = append(os.Environ(), "PATH="+privatelibvirt.Prefix+"/bin:"+os.Getenv("PATH"), "LIBVIRT_DEFAULT_URI="+privatelibvirt.URI, "HOME="+dir)
				out, err := cmd.CombinedOutput()
				t.Logf("# %s\n%s", c.text, out)
				if err != nil {
					t.Fatalf("%s: %v", c.text, err)
				}
				if strings.HasPrefix(c.text, "virsh start") {
					moving(t, d)
				}
			}
		})
	}
}

// The list of what isn't run has no command that no page has any more.
func TestElsewhere(t *testing.T) {
	used := map[string]bool{}
	for _, page := range pages(t) {
		for _, c := range commands(t, page) {
			used[c.text] = true
		}
	}
	for text, why := range elsewhere {
		if !used[text] {
			t.Errorf("no page has the command %q, which isn't run here because %s", text, why)
		}
	}
}

// moving waits until the guest's clock moves.
func moving(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	clock, err := d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	clock.Close()
}

func join(all []command) string {
	var b strings.Builder
	for _, c := range all {
		b.WriteString(c.text + "\n")
	}
	return b.String()
}
