package packages

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/container"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

const (
	checkpoints = 200
	shared      = "/srv/ftclock-test" // where the containers see the packages and the guest
)

// The life of the package on each Debian, under a domain that runs all the while. make test has the first Debian alone.
func TestKVMPackageLife(t *testing.T) {
	if missing := container.Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	dir := t.TempDir()
	check.NoError(t, os.Chmod(dir, 0o755))
	debs := map[string]string{}
	for _, tag := range Tags {
		debs[tag] = shared + "/" + filepath.Base(check.Value(built.Copy("packages/"+DebName(tag), dir))(t))
	}
	check.Value(guest.Copy(dir))(t)
	for _, name := range []string{"web1", "plain"} {
		x := privatelibvirt.GuestXML(name, shared+"/guest.elf")
		text := check.Value(x.Marshal())(t)
		check.NoError(t, os.WriteFile(filepath.Join(dir, name+".xml"), []byte(text), 0o644))
	}
	suites := []string{container.Debian12}
	if os.Getenv("FTCLOCK_LONG") == "1" {
		suites = append(suites, container.Debian13)
	}
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			c := check.Value(container.Start(suite, container.Options{Binds: map[string]string{dir: shared}}))(t)
			defer c.Close()
			h := &host{T: t, c: c}
			h.life(debs["v1.0.0"], debs["v1.1.0"])
			h.after(debs["v1.1.0"])
		})
	}
}

// host is a Debian with libvirt.
type host struct {
	*testing.T
	c *container.Container
}

// do runs a command that has to succeed.
func (h *host) do(args ...string) string {
	h.Helper()
	out := check.Value(h.c.Run(args...))(h)
	return strings.ReplaceAll(out, "\r\n", "\n") // of dpkg's, to which apt gives a terminal
}

// apt runs apt-get on packages that are there, without a network.
func (h *host) apt(args ...string) string {
	h.Helper()
	out := h.do(append([]string{"apt-get", "-y", "-q", "--no-install-recommends", "-o", "APT::Sandbox::User=root"}, args...)...)
	for _, line := range strings.Split(out, "\n") {
		if strings.HasPrefix(line, "ftclock: ") || strings.Contains(strings.ToLower(line), "warning") {
			h.Log(line)
		}
	}
	return out
}

// domain is a domain that runs.
type domain struct {
	*host
	name, uuid string
	qemu       int // pid, as the machine numbers it
	clock      *guest.Clock
	before     int64 // offset of its clock, ns
}

// start starts a domain and waits for its guest.
func (h *host) start(name string) *domain {
	h.Helper()
	h.do("virsh", "start", name)
	d := &domain{host: h, name: name, uuid: strings.TrimSpace(h.do("virsh", "domuuid", name))}
	pid := check.Value(strconv.Atoi(strings.TrimSpace(h.do("cat", "/run/libvirt/qemu/"+name+".pid"))))(h)
	if d.qemu = h.c.Outside(pid); d.qemu == 0 {
		h.Fatalf("%s: no process %d", name, pid)
	}
	d.clock = domaintest.ClockOfProcess(h, d.qemu)
	d.before = domaintest.Offset(h, d.clock)
	return d
}

// kept checks that nothing was lost since the start, whatever happened.
func (d *domain) kept(when string) {
	d.Helper()
	d.Logf("%s: drift of %d ns", when, domaintest.Kept(d, d.clock, d.before, "%s: the guest's clock drifted", when))
	domaintest.NoBacksteps(d, d.clock)
	if state := strings.TrimSpace(d.do("virsh", "domstate", d.name)); state != "running" {
		d.Errorf("%s: the domain is %s", when, state)
	}
}

// exercise makes the checkpoints, and goes on with them while something else is done.
func (d *domain) exercise(when string, meanwhile func()) {
	d.Helper()
	const pid = "/run/exercise.pid"
	args := "exercise " + d.name + " --rate 20 --pause 5 --count "
	if meanwhile == nil {
		args += strconv.Itoa(checkpoints)
	} else {
		args += "1000000"
	}
	cmd := d.c.Command("sh", "-c", "echo $$ >"+pid+"; exec ftclock "+args)
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	before := d.status()
	check.NoError(d, cmd.Start())
	if meanwhile != nil {
		d.pausing(before.Pauses + 5)
		meanwhile()
		d.pausing(before.Pauses + checkpoints)
		d.do("sh", "-c", "kill -INT $(cat "+pid+")")
	}
	err := cmd.Wait()
	interrupted := meanwhile != nil && strings.Contains(output.String(), "interrupted after")
	if err != nil && !interrupted {
		d.Fatalf("%s: %v\n%s", when, err, output.String())
	}
	s := d.status()
	if s.State != control.Correcting || s.Dropped+s.Anchored < before.Dropped+before.Anchored+checkpoints || s.Passed != before.Passed ||
		s.Disagreements != 0 {
		s.Records = nil
		d.Errorf("%s: status: %+v", when, s)
	}
	d.kept(when)
}

// pausing waits until there were so many pauses.
func (d *domain) pausing(until uint64) {
	d.Helper()
	check.Await(d, 5*time.Minute, 100*time.Millisecond, func() bool { return d.status().Pauses >= until }, "no checkpoints are made")
}

func (d *domain) status() control.Status {
	d.Helper()
	out, err := d.c.Run("ftclock", "status", d.name, "--format", "json")
	var all []control.Status
	if jerr := json.Unmarshal([]byte(out), &all); jerr != nil || len(all) != 1 {
		d.Fatalf("ftclock status: %v, %v\n%s", err, jerr, out)
	}
	return all[0]
}

// serves waits until the shim is that version's, with the same keeper and QEMU as before.
func (d *domain) serves(version string, before control.Status) {
	d.Helper()
	var s control.Status
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if s = d.status(); s.Version == version && s.State == control.Correcting {
			break
		}
	}
	if s.Version != version || s.Keeper != before.Keeper || s.QEMU != before.QEMU || s.Workers <= before.Workers {
		s.Records = nil
		d.Errorf("after %s was installed: %+v", version, s)
	}
}

// life is a package's life under one domain.
func (h *host) life(older, newer string) {
	h.do("virsh", "define", shared+"/web1.xml")
	h.do("virsh", "define", shared+"/plain.xml") // and libvirtd runs by now, without a hook
	if out := h.apt("install", older); !strings.Contains(out, "systemctl restart libvirtd") {
		h.Errorf("nobody is told to restart libvirtd:\n%s", out)
	}
	h.do("systemctl", "restart", "libvirtd")
	if out, err := h.c.Run("ftclock", "doctor"); err != nil {
		h.Errorf("%v\n%s", err, out)
	}
	h.do("logrotate", "-d", "/etc/logrotate.d/ftclock")
	h.units("after the installation", "enabled active", "disabled inactive")
	h.do("systemctl", "enable", "--now", exporter)
	h.do("ftclock", "enable", "web1")
	d := h.start("web1")
	before := d.readable()
	d.exercise("checkpoints", nil)
	if after := d.readable(); after != before {
		h.Errorf("%d checkpoints brought the log from %d lines to %d", checkpoints, before, after)
	}

	h.do("systemctl", "restart", "libvirtd")
	d.exercise("after libvirtd's restart", nil)

	served, exports := d.status(), h.mainPID(exporter)
	d.exercise("an upgrade among checkpoints", func() { h.apt("install", newer) })
	d.serves("v1.1.0", served)
	h.units("after the upgrade", "enabled active", "enabled active")
	if now := h.mainPID(exporter); now == exports || now == "0" {
		h.Errorf("after the upgrade the exporter is process %s, before it was %s", now, exports)
	}
	served = d.status()
	d.exercise("a downgrade among checkpoints", func() { h.apt("install", "--allow-downgrades", older) })
	d.serves("v1.0.0", served)

	h.reinstallHypervisor()
	d.exercise("after libvirt and QEMU were installed again", nil)

	// The domain outlives the package.
	if out := h.apt("remove", "ftclock"); !strings.Contains(out, "\n    web1\n") {
		h.Errorf("a removal says nothing of the domain that runs:\n%q", out)
	}
	h.units("after the removal", "inactive", "inactive")
	d.pauses()
	d.kept("after the removal")
	h.do("systemctl", "restart", "libvirtd")
	d.pauses()
	d.kept("after libvirtd's restart without ftclock")
	h.apt("purge", "ftclock")
	if out, err := h.c.Run("ls", control.Dir+"/"+d.uuid+"/"+control.SocketName); err != nil {
		h.Errorf("a purge took the state of a shim that lives: %v\n%s", err, out)
	}
	d.pauses()
	d.kept("after the purge")

	// It starts again without ftclock, as every other does.
	h.do("virsh", "destroy", "web1")
	h.do("virsh", "start", "web1")
	h.do("virsh", "destroy", "web1")
	h.do("virsh", "start", "plain")
	h.do("virsh", "destroy", "plain")
	h.forgotten()
	h.nothingLeft(control.Dir) // of the shim that lived at the purge
}

const timer, exporter = "ftclock-anchor.timer", "ftclock-exporter.service"

// units checks what systemd says of the timer and the exporter: whether they are enabled, if that is asked, and active.
func (h *host) units(when, ofTimer, ofExporter string) {
	h.Helper()
	for unit, want := range map[string]string{timer: ofTimer, exporter: ofExporter} {
		out, _ := h.c.Run("sh", "-c", "systemctl is-enabled "+unit+"; systemctl is-active "+unit) // and their exit codes
		if got := strings.Join(strings.Fields(out), " "); !strings.HasSuffix(" "+got, " "+want) {
			h.Errorf("%s: %s is %q, not %q", when, unit, got, want)
		}
	}
}

func (h *host) mainPID(unit string) string {
	h.Helper()
	return strings.TrimSpace(h.do("systemctl", "show", "--value", "-p", "MainPID", unit))
}

// after is a second installation, which leaves nothing at all.
func (h *host) after(deb string) {
	h.apt("install", deb)
	h.units("installed again", "enabled active", "disabled inactive") // a purge forgets that the exporter was switched on
	h.do("systemctl", "restart", "libvirtd")
	d := h.start("web1")
	d.exercise("installed again", nil)
	h.do("virsh", "managedsave", "web1") // leaves a reading in /var/lib/ftclock
	if out := h.do("ls", "/var/lib/ftclock"); !strings.Contains(out, d.uuid) {
		h.Errorf("a saved domain left no reading: %s", out)
	}
	h.apt("purge", "ftclock")
	h.nothingLeft()
}

// forgotten waits until systemd has forgotten the domains that ended: libvirtd counts from one again after its restart, and
// asks for the same names.
func (h *host) forgotten() {
	h.Helper()
	left := ""
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		left = h.do("systemctl", "list-units", "--all", "--plain", "--no-legend", "machine-qemu*.scope")
		if strings.TrimSpace(left) == "" {
			return
		}
	}
	status, _ := h.c.Run("systemctl", "status", "--no-pager", "machine-qemu*.scope")
	h.Errorf("scopes are left: %s\n%s", left, status)
}

// readable checks that an operator can read what the shim has to say, where systemd runs in the journal, and counts its lines.
func (d *domain) readable() (lines int) {
	d.Helper()
	d.do("test", "-d", "/run/systemd/system")
	log := d.do("journalctl", "-q", "-o", "cat", "-u", "ftclock-shim@"+d.uuid)
	if !strings.Contains(log, d.name) || !strings.Contains(log, "serving") && !strings.Contains(log, "correct") {
		d.Errorf("the shim's log says nothing of the domain:\n%s", log)
	}
	return strings.Count(log, "\n")
}

// pauses makes checkpoints by virsh, where there is no ftclock to make them.
func (d *domain) pauses() {
	d.Helper()
	d.do("sh", "-c", fmt.Sprintf("for i in $(seq %d); do virsh -q suspend %s && virsh -q resume %[2]s || exit 1; done", checkpoints/4, d.name))
}

// reinstallHypervisor installs libvirt's and QEMU's packages once more under what runs, from the files in the image.
func (h *host) reinstallHypervisor() {
	h.Helper()
	installed := h.do("dpkg-query", "-W", "-f", "${Package} ${Status}\n", "libvirt*", "qemu-system-x86*", "qemu-system-common*")
	args := []string{"install", "--reinstall"}
	for _, line := range strings.Split(installed, "\n") {
		if fields := strings.Fields(line); len(fields) == 4 && fields[3] == "installed" {
			args = append(args, fields[0])
		}
	}
	if len(args) < 6 {
		h.Fatalf("too few packages: %s", installed)
	}
	h.apt(args...)
}

// nothingLeft looks for files of ftclock's.
func (h *host) nothingLeft(but ...string) {
	h.Helper()
	var left []string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		left = nil
		out := h.do("sh", "-c", "find / /run -xdev -iname '*ftclock*' -not -path '/srv/*' -not -path '/proc/*' -not -path '/var/log/journal/*' -not -path '/var/log/apt/*'")
		for _, path := range strings.Fields(out) {
			if path != "/srv/ftclock-test" && !strings.Contains(" "+strings.Join(but, " ")+" ", " "+path+" ") {
				left = append(left, path)
			}
		}
		if len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		h.Errorf("left behind: %v", left)
	}
	for _, dir := range but {
		if out, err := h.c.Run("ls", "-A", dir); err == nil && out != "" {
			h.Errorf("left behind in %s: %s", dir, out)
		}
	}
}
