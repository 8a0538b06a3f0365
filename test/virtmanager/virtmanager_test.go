// Package virtmanager tests ftclock's domains in virt-manager, the real one, on an X server without a screen.
package virtmanager

import (
	"bufio"
	"bytes"
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

//go:embed drive.py
var driver []byte

var (
	conn *libvirt.Connect
	elf  string
)

func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(privatelibvirt.WithGuest(&conn, &elf, m.Run), privatelibvirt.Installed("../..")))
}

// manager is a virt-manager with a session of its own.
type manager struct {
	*testing.T
	env []string
	dir string // home, and where the driver is
}

// open starts virt-manager with a domain's window.
func open(t *testing.T, domain string) *manager {
	t.Helper()
	for program, debian := range map[string]string{
		"virt-manager": "virt-manager", "Xvfb": "xvfb", "import": "imagemagick", "dbus-daemon": "dbus", "/usr/bin/python3": "gir1.2-atspi-2.0",
	} {
		if _, err := exec.LookPath(program); err != nil {
			privatelibvirt.LeaveOut(t, "no "+program+": apt-get install "+debian)
		}
	}
	m := &manager{T: t, dir: t.TempDir()}
	check.NoError(t, os.WriteFile(filepath.Join(m.dir, "drive.py"), driver, 0o600))
	// What a person switches on in the preferences.
	settings := filepath.Join(m.dir, "config/glib-2.0/settings")
	check.NoError(t, os.MkdirAll(settings, 0o700))
	check.NoError(t, os.WriteFile(filepath.Join(settings, "keyfile"), []byte("[org/virt-manager/virt-manager]\nxmleditor-enabled=true\n"), 0o600))
	m.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + m.dir, "XDG_CONFIG_HOME=" + m.dir + "/config", "XDG_CACHE_HOME=" + m.dir + "/cache",
		"XDG_RUNTIME_DIR=" + m.dir, "GSETTINGS_BACKEND=keyfile", "LC_ALL=C.UTF-8", "LANGUAGE=en"}

	display := m.start("Xvfb", "-displayfd", "3", "-screen", "0", "1024x835x24", "-nolisten", "tcp")
	m.env = append(m.env, "DISPLAY=:"+display)
	bus := m.start("dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=3")
	m.env = append(m.env, "DBUS_SESSION_BUS_ADDRESS="+bus)
	m.start("virt-manager", "-c", privatelibvirt.URI, "--no-fork", "--show-domain-editor", domain)
	return m
}

// start starts a program that ends with the test. One that is told to by an argument 3 says a line on that descriptor.
func (m *manager) start(name string, args ...string) string {
	m.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Dir = m.env, m.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	output := filepath.Join(m.dir, name+".out")
	out := check.Value(os.Create(output))(m)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	read, write, err := os.Pipe()
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { read.Close() })
	cmd.ExtraFiles = []*os.File{write}
	err = cmd.Start()
	write.Close()
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
		if text, _ := os.ReadFile(output); m.Failed() && len(text) > 0 {
			m.Logf("%s:\n%s", name, text)
		}
	})
	if !strings.Contains(strings.Join(args, " "), "3") {
		return ""
	}
	line, err := bufio.NewReader(read).ReadString('\n')
	if err != nil {
		m.Fatalf("%s says nothing: %v", name, err)
	}
	return strings.TrimSpace(line)
}

// drive has the driver do something with a widget.
func (m *manager) drive(stdin string, args ...string) string {
	m.Helper()
	cmd := exec.Command("/usr/bin/python3", append([]string{m.dir + "/drive.py"}, args...)...)
	cmd.Env, cmd.Dir = m.env, m.dir
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.Fatalf("%v: %v\n%s%s", args, err, stderr.String(), out)
	}
	return string(out)
}

// picture takes a picture of the screen: into docs/pictures for make pictures, else to nowhere that stays.
func (m *manager) picture(name string) {
	m.Helper()
	dir := os.Getenv("FTCLOCK_PICTURES")
	if dir == "" {
		dir = m.dir
	}
	cmd := exec.Command("import", "-window", "root", "-strip", filepath.Join(dir, "virt-manager-"+name+".png"))
	cmd.Env = m.env
	if out, err := cmd.CombinedOutput(); err != nil {
		m.Errorf("taking a picture: %v: %s", err, out)
	}
}

// A person opens a managed domain, looks at it, edits it twice, and pauses it.
func TestKVMVirtManager(t *testing.T) {
	// However long it takes to press a button twice, it is caught up.
	const rule = `<ftclock:on event="suspend" do="catch-up"/>`
	const element, env = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">`, `<qemu:env name="FTCLOCK_SHOWN" value="kept"/>`
	x := privatelibvirt.GuestXML("web1", elf)
	privatelibvirt.Manage(x, element+rule+"</ftclock:clock>")
	privatelibvirt.SetEnvironment(x, [2]string{"FTCLOCK_SHOWN", "kept"})
	d, clock := domaintest.Start(t, conn, x)
	m := open(t, "web1")

	m.drive("", "click", "page tab", "XML")
	shown := m.drive("", "text", "text", "XML editor")
	for _, want := range []string{element, rule, env} {
		if !strings.Contains(shown, want) {
			t.Fatalf("the XML tab doesn't show %s:\n%s", want, shown)
		}
	}
	m.picture("xml")

	// What virt-manager makes of an edit is the definition of the next start.
	kept := func(how, want string) {
		t.Helper()
		m.drive("", "click", "push button", "config-apply")
		text := ""
		for end := time.Now().Add(time.Minute); !strings.Contains(text, want); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("an edit %s doesn't arrive:\n%s%s", how, text, m.drive("", "tree"))
			}
			text = check.Value(d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE))(t)
			text = strings.ReplaceAll(text, "'", `"`)
		}
		for _, want := range []string{element, rule, env} {
			if !strings.Contains(text, want) {
				t.Errorf("an edit %s lost %s:\n%s", how, want, text)
			}
		}
	}
	edited := strings.Replace(shown, element, element+`<ftclock:on event="checkpoint" limit="5s"/>`, 1)
	m.drive(edited, "type", "text", "XML editor")
	kept("of the XML", `<ftclock:on event="checkpoint" limit="5s"/>`)
	m.drive("", "click", "push button", "OK") // to "These changes will take effect after the next guest shutdown."
	m.picture("edited")

	m.drive("", "click", "page tab", "Details")
	m.drive("a domain with the right time", "type", "text", "Title:")
	kept("of the title", "<title>a domain with the right time</title>")

	before := domaintest.Offset(t, clock)
	for range 3 {
		m.drive("", "click", "toggle button", "Pause")
		domaintest.AwaitState(t, d, libvirt.DOMAIN_PAUSED)
		m.drive("", "wait", "label", "Paused (User)")
		m.picture("paused")
		m.drive("", "click", "toggle button", "Pause")
		domaintest.AwaitState(t, d, libvirt.DOMAIN_RUNNING)
		m.drive("", "wait", "label", "Running (Unpaused)")
	}
	check.Within(t, domaintest.Offset(t, clock)-before, guest.MaxDrift, "the guest's clock drifted")
	s := check.Value(d.Status(3))(t)
	if s.State != control.Correcting || s.Dropped+s.Anchored != 3 || s.Disagreements != 0 {
		t.Errorf("status: %+v", s)
	}
	for _, r := range s.Records {
		t.Logf("pause of %v: %s, %s", time.Duration(r.Lost), r.Event, r.Decision)
		want := clockpage.Checkpoint
		if time.Duration(r.Lost) > 10*time.Second { // the buttons took that long
			want = clockpage.Suspend
		}
		if r.Event != want {
			t.Errorf("a pause of %v is taken for a %s", time.Duration(r.Lost), r.Event)
		}
	}
}
