package wholehost

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/container"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/packages"
	"ftclock/test/privatelibvirt"
)

const (
	tools    = "/srv/ftclock-test" // where a host sees build/test
	patience = 10 * time.Minute
)

// host is a whole host of a test's.
type host struct {
	*kvmhost.Host
	t       *testing.T
	options kvmhost.HostOptions
	as      []string // a command that runs others as who the test is, where that isn't the kernel's first process
	known   int      // how many of SELinux's denials were seen
}

// boot boots a host with ftclock's package that goes with the test.
func boot(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	h.plug()
	h.install()
	return h
}

// newHost is a host that goes with the test, its plug not in yet, with further packages in its image. What is written to its disk stays for as long.
func newHost(t *testing.T, further ...string) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		privatelibvirt.LeaveOut(t, "not root; fix: run as root (sudo -E make test)")
	}
	image := check.Value(container.Image(container.Suite(), further...))(t)
	root := check.Value(built.Root())(t)
	// Not in memory, as /tmp may be.
	dir := check.Value(os.MkdirTemp(filepath.Join(root, "build"), "wholehost-"))(t)
	h := &host{t: t, options: kvmhost.HostOptions{Image: image, Disk: filepath.Join(dir, "disk"), Read: map[string]string{filepath.Join(root, "build/test"): tools}}}
	t.Cleanup(func() {
		if h.Host != nil {
			if t.Failed() {
				h.say()
			}
			h.Cut()
		}
		_ = os.RemoveAll(dir)
	})
	return h
}

// Run is the host's, by whoever the test is.
func (h *host) Run(args ...string) (string, error) { return h.Feed(nil, args...) }

// Feed is Run with something on the command's standard input.
func (h *host) Feed(input []byte, args ...string) (string, error) {
	return h.Host.Feed(input, slices.Concat(h.as, args)...)
}

// install installs ftclock's package.
func (h *host) install() {
	h.t.Helper()
	h.must("dpkg", "-i", tools+"/packages/"+packages.DebName(packages.Tags[0]))
	h.must("cp", tools+"/"+built.Guest, "/var/lib/guest.elf")
	// libvirt looks for hooks when it starts.
	h.must("systemctl", "restart", "libvirtd")
}

// plug boots the host, for the first time or after its plug was pulled.
func (h *host) plug() {
	h.t.Helper()
	check.NoError(h.t, h.up())
}

func (h *host) up() error {
	began := time.Now()
	up, err := kvmhost.Boot(h.options)
	if err != nil {
		return err
	}
	h.Host = up
	h.t.Logf("up in %.0f s", time.Since(began).Seconds())
	return nil
}

// say logs what the host can tell of a failure.
func (h *host) say() {
	for _, line := range []string{"journalctl --no-pager -n 120", "virsh list --all", "ftclock status", "ls -lR /var/lib/libvirt/qemu"} {
		out, err := h.Run("sh", "-c", line)
		h.t.Logf("# %s: %v\n%s", line, err, out)
	}
}

// must runs a command that has to succeed, and gives what it prints.
func (h *host) must(args ...string) string {
	h.t.Helper()
	return check.Value(h.Run(args...))(h.t)
}

// eventually waits for what has to come.
func (h *host) eventually(what string, holds func() bool) {
	h.t.Helper()
	check.Await(h.t, patience, 500*time.Millisecond, holds, "%s", what)
}

// define defines a managed domain that starts with the host.
func (h *host) define(name string) {
	h.t.Helper()
	h.defineWith(name, privatelibvirt.PatientElement)
}

// defineWith is define with other metadata; "" is none.
func (h *host) defineWith(name, metadata string) {
	h.t.Helper()
	x := privatelibvirt.GuestXML(name, "/var/lib/guest.elf")
	x.QEMUCapabilities = privatelibvirt.NoCPUProperties
	privatelibvirt.Manage(x, metadata)
	text := check.Value(x.Marshal())(h.t)
	if out, err := h.Feed([]byte(text), "virsh", "define", "/dev/stdin"); err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	h.must("virsh", "autostart", name)
}

// reading is a domain's clock, in ns: how far it is behind the host's CLOCK_MONOTONIC_RAW, and that behind CLOCK_REALTIME; and how long the
// host had slept.
type reading struct{ offset, realtime, slept int64 }

// read reads the clocks of domains, whose guests mustn't have seen time go back.
func (h *host) read(names []string) map[string]reading {
	h.t.Helper()
	all := map[string]reading{}
	out, err := h.Host.Run(append([]string{tools + "/clock"}, names...)...) // no program of the host's, whose policy doesn't know it
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		var (
			name      string
			r         reading
			backsteps int
		)
		if _, err := fmt.Sscan(line, &name, &r.offset, &backsteps, &r.realtime, &r.slept); err != nil {
			h.t.Fatalf("%q: %v", line, err)
		}
		if backsteps != 0 {
			h.t.Errorf("%s: its guest saw time go back %d times", name, backsteps)
		}
		all[name] = r
	}
	return all
}

// running waits until the domains run.
func (h *host) running(names []string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("%v running", names), func() bool {
		out, err := h.Run("virsh", "list", "--name", "--state-running")
		return err == nil && len(strings.Fields(out)) == len(names)
	})
}

// keepTime checks that the domains run, are served, and lose nothing by pauses.
func (h *host) keepTime(names []string, pauses int) {
	h.t.Helper()
	h.running(names)
	before := h.read(names)
	for _, name := range names {
		h.must("ftclock", "exercise", name, "--rate", "20", "--pause", "5", "--count", strconv.Itoa(pauses))
	}
	for name, after := range h.read(names) {
		drift := after.offset - before[name].offset
		h.t.Logf("%s: drift of %d ns after %d pauses", name, drift, pauses)
		check.Within(h.t, drift, guest.MaxDrift, "%s: drift", name)
	}
	if out, err := h.Run("ftclock", "status"); err != nil || strings.Count(out, "correcting") != len(names) {
		h.t.Errorf("status: %v\n%s", err, out)
	}
}
