// Package docs runs the commands of the documentation, in a private libvirt with a domain web1, as a reader would.
package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

// Links between the pages lead somewhere, and the index has every page.
func TestLinks(t *testing.T) {
	index, err := os.ReadFile(filepath.Join(repo, "docs/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, page := range pages(t) {
		text, err := os.ReadFile(filepath.Join(repo, page))
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range link.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(repo, filepath.Dir(page), found[1])); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
		if name := filepath.Base(page); name != "README.md" && !strings.Contains(string(index), "]("+name+")") {
			t.Errorf("the index has no %s", name)
		}
	}
}

// literals are the strings in the Go code of these directories, but for tests.
func literals(t *testing.T, dirs ...string) (all []string) {
	t.Helper()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(repo, dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no code in %s: %v", dir, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(parsed, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if text, err := strconv.Unquote(lit.Value); err == nil {
						all = append(all, text)
					}
				}
				return true
			})
		}
	}
	return all
}

var verb = regexp.MustCompile(`%[-+# 0-9.]*(\[\d+\])?[a-zA-Z]`)

// The troubleshooting page's headings are messages that the programs have, and it has all that the loader and the starting of a
// shim can end with.
func TestTroubleshooting(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(repo, "docs/troubleshooting.md"))
	if err != nil {
		t.Fatal(err)
	}
	known := literals(t, "hooks", "spawn", "unit", "disk", "qmp-shim", "attach", "control", "record", "cmd/ftclock")
	var headings []string
	for _, found := range regexp.MustCompile("(?m)^### `(.+)`$").FindAllStringSubmatch(string(page), -1) {
		headings = append(headings, found[1])
	}
	if len(headings) < 30 {
		t.Fatalf("%d headings", len(headings))
	}
	// What stands between the places for names has to be in one message, in that order.
	in := func(heading, message string) bool {
		message = verb.ReplaceAllString(message, "…")
		for part := range strings.SplitSeq(heading, "…") {
			part = strings.Trim(part, ` "`)
			_, rest, found := strings.Cut(message, part)
			if !found {
				return false
			}
			message = rest
		}
		return true
	}
	for _, heading := range headings {
		if !slices.ContainsFunc(known, func(message string) bool { return in(heading, message) }) {
			t.Errorf("no program says %q", heading)
		}
	}
	sentinels := regexp.MustCompile(`Err[A-Z]\w+\s+= errors\.New\("([^"]+)"\)`).FindAllSubmatch(source(t, "attach"), -1)
	if len(sentinels) < 5 {
		t.Fatalf("%d errors of the loader", len(sentinels))
	}
	for _, found := range sentinels {
		if !slices.Contains(headings, string(found[1])) {
			t.Errorf("the page has no %q", found[1])
		}
	}
}

func source(t *testing.T, dir string) (all []byte) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(repo, dir, "*.go"))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
	}
	return all
}
