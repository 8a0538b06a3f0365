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
	"libvirt.org/go/libvirtxml"

	"ftclock/control"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

const maxDrift = 10_000 // ns

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
	if err := os.WriteFile(filepath.Join(m.dir, "drive.py"), driver, 0o600); err != nil {
		t.Fatal(err)
	}
	// What a person switches on in the preferences.
	settings := filepath.Join(m.dir, "config/glib-2.0/settings")
	if err := os.MkdirAll(settings, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(settings, "keyfile"), []byte("[org/virt-manager/virt-manager]\nxmleditor-enabled=true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
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
	out, err := os.Create(output)
	if err != nil {
		m.Fatal(err)
	}
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
	x.Metadata = &libvirtxml.DomainMetadata{XML: element + rule + "</ftclock:clock>"}
	x.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{Envs: []libvirtxml.DomainQEMUCommandlineEnv{{Name: "FTCLOCK_SHOWN", Value: "kept"}}}
	d, err := privatelibvirt.Define(conn, x)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	}()
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	clock, err := d.Clock()
	if err != nil {
		t.Fatal(err)
	}
	defer clock.Close()
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
			if text, err = d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE); err != nil {
				t.Fatal(err)
			}
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

	before := offset(t, clock)
	for range 3 {
		m.drive("", "click", "toggle button", "Pause")
		waitState(t, d, libvirt.DOMAIN_PAUSED)
		m.drive("", "wait", "label", "Paused (User)")
		m.picture("paused")
		m.drive("", "click", "toggle button", "Pause")
		waitState(t, d, libvirt.DOMAIN_RUNNING)
		m.drive("", "wait", "label", "Running (Unpaused)")
	}
	if drift := offset(t, clock) - before; drift > maxDrift || drift < -maxDrift {
		t.Errorf("the guest's clock drifted by %d ns", drift)
	}
	uuid, err := d.GetUUIDString()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := control.Ask(control.Dir, uuid, control.Request{Do: "status", Records: 3})
	if err != nil {
		t.Fatal(err)
	}
	s := answer.Status
	if s.State != control.Correcting || s.Dropped+s.Anchored != 3 || s.Disagreements != 0 {
		t.Errorf("status: %+v", s)
	}
	for _, r := range s.Records {
		t.Logf("pause of %v: %s, %s", time.Duration(r.Lost), r.Event, r.Decision)
		want := "checkpoint"
		if time.Duration(r.Lost) > 10*time.Second { // the buttons took that long
			want = "suspend"
		}
		if r.Event != want {
			t.Errorf("a pause of %v is taken for a %s", time.Duration(r.Lost), r.Event)
		}
	}
}

func offset(t *testing.T, c *guest.Clock) int64 {
	t.Helper()
	o, err := c.SettledOffset()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func waitState(t *testing.T, d *privatelibvirt.Domain, want libvirt.DomainState) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		state, _, err := d.GetState()
		if err != nil {
			t.Fatal(err)
		}
		if state == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the domain's state is %d, want %d", state, want)
		}
	}
}
