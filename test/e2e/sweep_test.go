package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"
)

// A step is one call of virsh in the sweep.
type step struct {
	// line is virsh's command line. $DIR is a directory that QEMU may write to.
	line string
	// mask says which parts of the output are different every time.
	mask *regexp.Regexp
	// mayFail says that the command needn't succeed: it is meant to be refused, or machines and versions differ in it.
	mayFail bool
	// until repeats the call until its output, normalised, contains that.
	until string
	// fds is how many descriptors virsh gets, from 3 on.
	fds int
	// do is called in the place of virsh, the line being only its name then.
	do func(p *pass) (string, error)
}

// An outcome is what a step gave.
type outcome struct {
	status int
	output string // normalised
}

func (o outcome) String() string {
	text := strings.ReplaceAll(strings.TrimSpace(o.output), "\n", " | ")
	if len(text) > 160 {
		text = fmt.Sprintf("%s ... (%d bytes)", text[:160], len(text))
	}
	return fmt.Sprintf("%d %q", o.status, text)
}

// A pass is one run of all steps. Both passes use the same name, UUID and addresses: only one of them runs at a time.
type pass struct {
	t        *testing.T
	domain   *privatelibvirt.Domain
	dir      string
	shim     bool
	outcomes []outcome
	wrong    string // what was told last of the shim's status
}

const (
	sweepUUID  = "5eed5eed-0000-4000-8000-000000000001"
	sweepPause = 5 * time.Millisecond
)

// Every command of virsh that reaches QEMU has, through the shim, the result that it has without.
func TestKVMVirshSweep(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		privatelibvirt.LeaveOut(t, "no qemu-img; fix: apt-get install qemu-utils")
	}
	steps := sweepSteps
	if kvmhost.Emulated() && os.Getenv("FTCLOCK_LONG") != "1" {
		steps = fewSteps()
		t.Logf("%d of %d steps: all of them take a quarter of an hour in an emulated host, make sweep", len(steps), len(sweepSteps))
	}
	var without []outcome
	t.Run("without", func(t *testing.T) { without = sweep(t, steps, "", nil) })
	if t.Failed() {
		return
	}
	t.Run("with", func(t *testing.T) { sweep(t, steps, clockElement, without) })
}

// fewSteps are those up to the removal of a managed save, and a life whose clock is looked at.
func fewSteps() []step {
	n := slices.IndexFunc(sweepSteps, func(s step) bool { return s.line == "managedsave-remove sweep" })
	return append(slices.Clone(sweepSteps[:n+1]), step{line: "start sweep"}, step{line: "the guest's clock", do: clockIsKept}, step{line: "destroy sweep"})
}

// sweep makes one pass. Its outcomes are compared with those of an earlier one, if there is one.
func sweep(t *testing.T, steps []step, metadata string, earlier []outcome) []outcome {
	p := &pass{t: t, shim: metadata != ""}
	p.prepare(metadata)
	events := p.watchAll()
	for i, s := range steps {
		o := p.take(s)
		p.outcomes = append(p.outcomes, o)
		if !s.mayFail && o.status != 0 {
			t.Errorf("%s: %v", s.line, o)
		}
		if earlier != nil {
			p.compare(s.line, earlier[i], o)
		}
		p.ask(s.line)
	}
	o := outcome{output: p.eventsOf(events)}
	p.outcomes = append(p.outcomes, o)
	if earlier != nil {
		p.compare("event --all", earlier[len(earlier)-1], o)
	}
	return p.outcomes
}

// watchAll begins to collect all events of all domains.
func (p *pass) watchAll() *watcher {
	w := watchEvents(p.t, "event", "--all", "--loop")
	p.marker(w, "begin")
	return w
}

// marker puts the events of another domain behind all that were there before, and waits for them.
func (p *pass) marker(w *watcher, name string) {
	w.until(func() {
		d := check.Value(privatelibvirt.Define(conn, privatelibvirt.GuestXML(name, elf)))(p.t)
		check.NoError(p.t, d.Remove())
	}, "'"+name+"': Undefined")
}

// eventsOf gives the sweep's events: those of its life in their order, and which others there were. What is left out comes
// when the guest pleases, and when libvirt happened to ask QEMU something in the moment of its end.
func (p *pass) eventsOf(w *watcher) string {
	p.marker(w, "end")
	w.stop()
	var life strings.Builder
	var others []string
	for line := range strings.Lines(w.text()) {
		switch line = p.normalise(line, numbers); {
		case !strings.Contains(line, "'sweep'"), strings.Contains(line, "'reboot'"), strings.Contains(line, "'control-error'"):
		case strings.Contains(line, "'lifecycle'"):
			life.WriteString(line)
		default:
			others = append(others, line)
		}
	}
	// A watcher that begins is waited for with as many pauses as it takes.
	const pause = "event 'lifecycle' for domain 'sweep': Suspended Paused\nevent 'lifecycle' for domain 'sweep': Resumed Unpaused\n"
	text := life.String()
	for strings.Contains(text, pause+pause) {
		text = strings.ReplaceAll(text, pause+pause, pause)
	}
	slices.Sort(others)
	return text + strings.Join(slices.Compact(others), "")
}

// compare logs a step's two outcomes.
func (p *pass) compare(line string, without, with outcome) {
	p.t.Helper()
	if with == without {
		p.t.Logf("%s: without and with: %v", line, with)
		return
	}
	p.t.Errorf("%s:\nwithout: %d\n%s\nwith:    %d\n%s", line, without.status, without.output, with.status, with.output)
}

// ask checks what the shim says after a step, where one runs. What is wrong is told once.
func (p *pass) ask(line string) {
	p.t.Helper()
	if !p.shim {
		return
	}
	answer, err := control.Ask(control.Dir, sweepUUID, control.Request{Do: "status", Records: 1})
	for end := time.Now().Add(time.Minute); err != nil; time.Sleep(50 * time.Millisecond) {
		active, _ := p.domain.IsActive()
		if !active {
			return
		}
		if time.Now().After(end) { // libvirt takes its time to see the end of a domain that goes by itself
			p.t.Errorf("%s: a domain runs without its shim: %v", line, err)
			return
		}
		answer, err = control.Ask(control.Dir, sweepUUID, control.Request{Do: "status", Records: 1})
	}
	s := answer.Status
	if wrong := fmt.Sprint(s.Shim, s.State, s.Why, s.LastDisagreement, s.Warnings); wrong != p.wrong &&
		(s.State != control.Correcting || s.Disagreements != 0 || len(s.Warnings) != 0) {
		p.wrong = wrong
		p.t.Errorf("%s: status: %+v", line, s)
	}
}

// take runs one step.
func (p *pass) take(s step) outcome {
	p.t.Helper()
	if s.do != nil {
		output, err := s.do(p)
		if err != nil {
			p.t.Fatalf("%s: %v\n%s", s.line, err, output)
		}
		return outcome{output: output}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		output, status := p.virsh(s)
		o := outcome{status: status, output: p.normalise(output, s.mask)}
		if strings.Contains(o.output, s.until) || time.Now().After(deadline) {
			return o
		}
	}
}

// virsh gives what virsh prints, both streams, and its exit status.
func (p *pass) virsh(s step) (output string, status int) {
	p.t.Helper()
	cmd := exec.Command("virsh", "-c", privatelibvirt.URI, strings.ReplaceAll(s.line, "$DIR", p.dir))
	for range s.fds {
		f := check.Value(os.Open("/dev/null"))(p.t)
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// What two runs never have in common, and what makes the difference between the passes.
var (
	maskMetadata = regexp.MustCompile(`\s*<metadata>(?s:.*?)</metadata>`)
	maskSpaces   = regexp.MustCompile(`[ \t]+`)
	maskRules    = regexp.MustCompile(`-{5,}`)
	maskNames    = []struct {
		pattern *regexp.Regexp
		by      string
	}{
		{regexp.MustCompile(`\bvnet\d+`), "vnet#"},
		{regexp.MustCompile(`\blibvirt-\d+"`), `libvirt-#"`},          // a command's id
		{regexp.MustCompile(`/domain-\d+-sweep`), "/domain-#-sweep"},  // libvirt's directory
		{regexp.MustCompile(`(<domain [^>]*) id='\d+'`), "$1 id='#'"}, // in the XML
		{regexp.MustCompile(`<creationTime>\d+<`), "<creationTime>#<"},
		{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [-+]\d{4}`), "DATE"},
	}

	numbers = regexp.MustCompile(`-?\d+(\.\d+)?`)
)

func (p *pass) normalise(output string, mask *regexp.Regexp) string {
	output = maskMetadata.ReplaceAllString(output, "")
	for _, n := range maskNames {
		output = n.pattern.ReplaceAllString(output, n.by)
	}
	if mask != nil {
		output = mask.ReplaceAllString(output, "#")
	}
	output = maskRules.ReplaceAllString(output, "---")
	return maskSpaces.ReplaceAllString(output, " ")
}

// prepare defines the domain and what the steps use in $DIR.
func (p *pass) prepare(metadata string) {
	t := p.t
	dir := check.Value(privatelibvirt.QEMUDir("sweep"))(t)
	p.dir = dir
	t.Cleanup(func() { os.RemoveAll(dir) })
	x := sweepXML(dir)
	privatelibvirt.Manage(x, metadata)
	text := check.Value(x.Marshal())(t)
	write := func(name, text string) {
		check.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	write("sweep.xml", text)
	for name, text := range sweepFiles {
		write(name, strings.ReplaceAll(text, "$DIR", dir))
	}
	for _, name := range []string{"vda", "added", "usb"} {
		domaintest.Disk(t, filepath.Join(dir, name))
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(privatelibvirt.Log(x.Name))
			t.Log(shimLog(x.Name))
		}
		_, _ = virsh("destroy", x.Name) // it runs only after a failure
		if out, err := virsh("undefine", x.Name, "--managed-save", "--snapshots-metadata", "--checkpoints-metadata"); err != nil {
			t.Error(err, out)
		}
		nothingLeft(t)
	})
	d := check.Value(privatelibvirt.Define(conn, x))(t)
	t.Cleanup(func() { _ = d.Free() })
	p.domain = d
}

// sweepXML is a domain with one of everything that the steps need.
func sweepXML(dir string) *libvirtxml.Domain {
	x := privatelibvirt.GuestXML("sweep", elf)
	x.UUID = sweepUUID
	privatelibvirt.ACPI(x)
	x.VCPU = &libvirtxml.DomainVCPU{Current: 1, Value: 2}
	vda := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "qcow2"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: filepath.Join(dir, "vda")}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "vda", Bus: "virtio"},
	}
	cdrom := libvirtxml.DomainDisk{
		Device:   "cdrom",
		Driver:   &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
		Target:   &libvirtxml.DomainDiskTarget{Dev: "hdc", Bus: "ide"},
		ReadOnly: &libvirtxml.DomainDiskReadOnly{},
	}
	x.Devices.Disks = []libvirtxml.DomainDisk{vda, cdrom}
	x.Devices.Controllers = []libvirtxml.DomainController{{Type: "usb", Model: "piix3-uhci"}}
	x.Devices.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "virtio"}
	x.Devices.Interfaces = []libvirtxml.DomainInterface{{
		MAC:    &libvirtxml.DomainInterfaceMAC{Address: "52:54:00:00:01:00"},
		Source: &libvirtxml.DomainInterfaceSource{Ethernet: &libvirtxml.DomainInterfaceSourceEthernet{}},
		Model:  &libvirtxml.DomainInterfaceModel{Type: "e1000"},
		ROM:    &libvirtxml.DomainROM{Enabled: "no"},
	}}
	x.Devices.Videos = []libvirtxml.DomainVideo{{Model: libvirtxml.DomainVideoModel{Type: "vga", VRam: 16384}}}
	x.Devices.Graphics = []libvirtxml.DomainGraphic{{VNC: &libvirtxml.DomainGraphicVNC{Socket: filepath.Join(dir, "vnc.sock")}}}
	return x
}

// A watcher is a virsh that prints events.
type watcher struct {
	t    *testing.T
	cmd  *exec.Cmd
	path string
}

// watchEvents has virsh print events from about now on: it doesn't say when it is ready.
func watchEvents(t *testing.T, args ...string) *watcher {
	t.Helper()
	// Its output would come at its end only.
	args = append([]string{"-oL", "virsh", "-c", privatelibvirt.URI}, args...)
	w := &watcher{t: t, cmd: exec.Command("stdbuf", args...), path: filepath.Join(t.TempDir(), "events")}
	file := check.Value(os.Create(w.path))(t)
	defer file.Close()
	w.cmd.Stdout, w.cmd.Stderr = file, file
	check.NoError(t, w.cmd.Start())
	t.Cleanup(w.stop)
	return w
}

// until has f make events until one of each kind was printed.
func (w *watcher) until(f func(), kinds ...string) {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		f()
		missing := ""
		for _, kind := range kinds {
			if !strings.Contains(w.text(), kind) {
				missing = kind
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("virsh shows no event %q:\n%s", missing, w.text())
		}
	}
}

func (w *watcher) text() string {
	w.t.Helper()
	return string(check.Value(os.ReadFile(w.path))(w.t))
}

// stop ends virsh as a person does.
func (w *watcher) stop() {
	if w.cmd.ProcessState == nil {
		_ = w.cmd.Process.Signal(unix.SIGINT)
		_ = w.cmd.Wait()
	}
}
