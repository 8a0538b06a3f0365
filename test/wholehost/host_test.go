package wholehost

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/container"
	"ftclock/test/kvmhost"
	"ftclock/test/packages"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

const (
	clockElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`
	tools        = "/srv/ftclock-test" // where a host sees build/test
	patience     = 10 * time.Minute
	maxDrift     = 10_000 // ns
)

// host is a whole host of a test's.
type host struct {
	*kvmhost.Host
	t       *testing.T
	options kvmhost.HostOptions
}

// suite is the Debian that boots.
func suite() string {
	if s := os.Getenv("FTCLOCK_SUITE"); s != "" {
		return s
	}
	return container.Debian12
}

// boot boots a host with ftclock's package that goes with the test. What is written to its disk stays for as long.
func boot(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		privatelibvirt.LeaveOut(t, "not root; fix: run as root (sudo -E make test)")
	}
	image, err := container.Image(suite())
	if err != nil {
		t.Fatal(err)
	}
	root, err := built.Root()
	if err != nil {
		t.Fatal(err)
	}
	// Not in memory, as /tmp may be.
	dir, err := os.MkdirTemp(filepath.Join(root, "build"), "wholehost-")
	if err != nil {
		t.Fatal(err)
	}
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
	h.plug()
	h.must("dpkg", "-i", tools+"/packages/"+packages.DebName(packages.Tags[0]))
	h.must("cp", tools+"/"+built.Guest, "/var/lib/guest.elf")
	// libvirt looks for hooks when it starts.
	h.must("systemctl", "restart", "libvirtd")
	return h
}

// plug boots the host, for the first time or after its plug was pulled.
func (h *host) plug() {
	h.t.Helper()
	began := time.Now()
	up, err := kvmhost.Boot(h.options)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Host = up
	h.t.Logf("up in %.0f s", time.Since(began).Seconds())
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
	out, err := h.Run(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// eventually waits for what has to come.
func (h *host) eventually(what string, holds func() bool) {
	h.t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(500 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("in vain waited for: %s", what)
		}
	}
}

// define defines a managed domain that starts with the host.
func (h *host) define(name string) {
	h.t.Helper()
	x := privatelibvirt.GuestXML(name, "/var/lib/guest.elf")
	x.QEMUCapabilities = privatelibvirt.NoCPUProperties
	x.Metadata = &libvirtxml.DomainMetadata{XML: clockElement}
	text, err := x.Marshal()
	if err != nil {
		h.t.Fatal(err)
	}
	if out, err := h.Feed([]byte(text), "virsh", "define", "/dev/stdin"); err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	h.must("virsh", "autostart", name)
}

// offsets are the clocks of domains, in ns against the host's CLOCK_MONOTONIC_RAW.
func (h *host) offsets(names []string) map[string]int64 {
	h.t.Helper()
	all := map[string]int64{}
	for line := range strings.Lines(h.must(append([]string{tools + "/clock"}, names...)...)) {
		fields := strings.Fields(line)
		offset, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			h.t.Fatal(err)
		}
		if fields[2] != "0" {
			h.t.Errorf("%s: its guest saw time go back %s times", fields[0], fields[2])
		}
		all[fields[0]] = offset
	}
	return all
}

// keepTime checks that the domains run, are served, and lose nothing by pauses.
func (h *host) keepTime(names []string, pauses int) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("%v running", names), func() bool {
		out, err := h.Run("virsh", "list", "--name", "--state-running")
		return err == nil && len(strings.Fields(out)) == len(names)
	})
	before := h.offsets(names)
	for _, name := range names {
		h.must("ftclock", "exercise", name, "--rate", "20", "--pause", "5", "--count", strconv.Itoa(pauses))
	}
	for name, after := range h.offsets(names) {
		drift := after - before[name]
		h.t.Logf("%s: drift of %d ns after %d pauses", name, drift, pauses)
		if drift > maxDrift || drift < -maxDrift {
			h.t.Errorf("%s: drift of %d ns", name, drift)
		}
	}
	if out, err := h.Run("ftclock", "status"); err != nil || strings.Count(out, "correcting") != len(names) {
		h.t.Errorf("status: %v\n%s", err, out)
	}
}
