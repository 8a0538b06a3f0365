package live

import (
	"os"
	"strings"
	"testing"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	metadata "ftclock/xml-templates"
)

// A shim that is there is given the policy, and none is started.
func TestServeWithShim(t *testing.T) {
	at := status.Dirs{Shims: t.TempDir()}
	f, err := fakeshim.Start(at.Shims, control.Status{Name: "web", UUID: fakeshim.UUID, Version: "fake", Mode: control.Relay, State: control.Correcting})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()
	l := &QEMU{dirs: at, Domain: &hypervisor.Domain{Name: "web", UUID: fakeshim.UUID}, pid: -1}
	var out strings.Builder
	u := &ui.UI{Stdout: &out}
	policy := metadata.Default()
	policy.Reference = metadata.UTC
	if err := l.Serve(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	if got := f.Last(); got.Do != "policy" || got.Clock != policy.XML() {
		t.Errorf("asked %+v", got)
	}
	if err := l.Report(u); err != nil || strings.Contains(out.String(), "is relayed until it stops") {
		t.Errorf("%v, %s", err, out.String())
	}
	policy.Monitor = metadata.Direct
	f.Say(func(s *control.Status) { s.Clock = policy.XML() })
	if err := l.Report(u); err != nil || !strings.Contains(out.String(), "web: its monitor is relayed until it stops\n") {
		t.Errorf("%v, %s", err, out.String())
	}
	const missed = "web: is paused, and this pause isn't caught up"
	l.paused = true
	if err := l.Report(u); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), missed) {
		t.Errorf("the module was there when the pause began: %s", out.String())
	}
	l.fresh = true
	if err := l.Report(u); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), missed) {
		t.Errorf("nothing about the pause: %s", out.String())
	}

	// Leaving the clock alone: a relay stays.
	said, err := l.Leave(t.Context())
	if err != nil || !strings.Contains(said, "relays the monitor until the domain stops") {
		t.Errorf("%q, %v", said, err)
	}
	if got := f.Last(); got.Do != "policy" || got.Clock != "" {
		t.Errorf("asked %+v", got)
	}
	// A watch goes. This fake can't.
	f.Say(func(s *control.Status) { s.Mode = control.Watch })
	if _, err := l.Leave(t.Context()); err == nil || !strings.Contains(err.Error(), "fake doesn't know quit") {
		t.Errorf("%v", err)
	}
}

func TestFindProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root; fix: run the tests as root")
	}
	for _, pid := range []int{-1, 0, 1, 1 << 22} {
		if _, err := FindProcess(status.Dirs{}, pid); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%d: %v", pid, err)
		}
	}
}

// Who serves a QEMU already is found by what the shims say, not by what the QEMU says of itself.
func TestLeft(t *testing.T) {
	at := status.Dirs{Shims: t.TempDir(), Libvirt: t.TempDir()}
	f, err := fakeshim.Start(at.Shims, control.Status{Name: "web", UUID: fakeshim.UUID, Version: "fake", QEMU: os.Getpid(), State: control.Correcting})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()
	l := &QEMU{dirs: at, Domain: &hypervisor.Domain{Name: "web", UUID: "pid-2-3"}, pid: os.Getpid(), guest: fakeshim.UUID}
	expect := func(what, want string, wantOurs bool) {
		t.Helper()
		if why, ours, err := l.Left(); err != nil || ours != wantOurs || !strings.Contains(why, want) || (why == "") != (want == "") {
			t.Errorf("%s: %q, %t, %v", what, why, ours, err)
		}
	}
	expect("a domain of libvirt's", "a shim serves it as a domain of this host's libvirt", false)
	f.Say(func(s *control.Status) { s.QEMU = os.Getpid() + 1 })
	expect("another QEMU that calls itself so", "", false)
	l.guest = "../" + fakeshim.UUID
	expect("no UUID", "", false)
	l.Domain.UUID = fakeshim.UUID
	expect("served as this would serve it", "", true)
}
