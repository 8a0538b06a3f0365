package unit

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"

	"ftclock/spawn"
	"ftclock/test/check"
)

// place is a container and its host in a directory of the test's: the host sees the container's paths below its own root, and has
// those that it shares as links.
type place struct {
	Host
	*manager
	host, dir string
	notes     []string
}

func newPlace(t *testing.T) *place {
	root := t.TempDir()
	p := &place{manager: &manager{t: t}, host: filepath.Join(root, "host"), dir: filepath.Join(root, "container")}
	p.Host = Host{
		Booted: p.dir + "/run/systemd/system", State: p.dir + "/run/ftclock", LastStops: p.dir + "/readings",
		Root: p.dir, InitRoot: p.host,
		Connect: func(context.Context) (Manager, error) { return p.manager, nil },
		Direct: func(context.Context, string, spawn.Spec) error {
			t.Error("a shim is started in the container")
			return nil
		},
		Note: func(_, warning string) { p.notes = append(p.notes, warning) },
		Shim: func() (string, error) { return p.dir + "/shim", nil },
	}
	for _, dir := range []string{p.Booted, p.dir + "/run/libvirt", p.dir + "/lib/domain-1-a"} {
		check.NoError(t, os.MkdirAll(dir, 0o755))
	}
	p.share(t, "/run", "/lib")
	p.program(t, p.dir+"/shim", "one")
	p.program(t, p.host+p.dir+"/shim", "one")
	return p
}

func (p *place) share(t *testing.T, names ...string) {
	check.NoError(t, os.MkdirAll(p.host+p.dir, 0o755))
	for _, name := range names {
		check.NoError(t, os.Symlink(p.dir+name, p.host+p.dir+name))
	}
}

func (p *place) program(t *testing.T, path, version string) {
	check.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\necho ftclock-shim "+version+"\n"), 0o755))
}

func (p *place) order() spawn.Spec {
	return spawn.Spec{UUID: id, Name: "a", DomainDir: p.dir + "/lib/domain-1-a", PIDFile: p.dir + "/run/libvirt/a.pid"}
}

func (p *place) taken() (string, error) {
	spawn.Take(p.State, id)
	return "done", nil
}

// A container's shim is a unit of the host's, or nothing.
func TestTheContainersPlace(t *testing.T) {
	unknown := func() (string, error) { return "", dbus.Error{Name: "org.freedesktop.systemd1.NoSuchUnit"} }
	masked := func() (string, error) { return "", dbus.Error{Name: "org.freedesktop.systemd1.UnitMasked"} }
	for name, c := range map[string]struct {
		change  func(*testing.T, *place)
		step    func() (string, error) // nil: the unit's shim gets ready
		refused string                 // a shim's own reason
		wants   []string               // in the error; none: it starts
		note    string
		starts  int
	}{
		"all is there": {starts: 1},
		"no directory of readings on the host": {starts: 1, change: func(t *testing.T, p *place) {
			t.Cleanup(func() {
				if info, err := os.Stat(p.host + p.LastStops); err != nil || !info.IsDir() {
					t.Errorf("the host's directory of readings: %v", err)
				}
			})
		}},
		"a /run of its own": {wants: []string{"doesn't have the host's /run", "fix: ", "--volume /run:/run:shared"}, change: func(t *testing.T, p *place) {
			check.NoError(t, errors.Join(os.Remove(p.host+p.dir+"/run"), os.MkdirAll(p.host+p.Booted, 0o755), os.RemoveAll(p.Booted)))
		}},
		"a host without systemd": {wants: []string{"no systemd", "fix: run libvirt on the host"}, change: func(t *testing.T, p *place) {
			check.NoError(t, os.RemoveAll(p.Booted))
		}},
		"another state": {wants: []string{"/run/ftclock isn't the host's", "fix: "}, change: func(t *testing.T, p *place) {
			check.NoError(t, errors.Join(os.Remove(p.host+p.dir+"/run"), os.MkdirAll(p.host+p.State, 0o755)))
		}},
		"libvirt's directory in a volume": {wants: []string{"/lib/domain-1-a isn't the host's", "fix: ", "--volume /var/lib/libvirt:/var/lib/libvirt"}, change: func(t *testing.T, p *place) {
			check.NoError(t, os.Remove(p.host+p.dir+"/lib"))
		}},
		"libvirt's directory of an earlier container": {wants: []string{"/lib/domain-1-a isn't the host's"}, change: func(t *testing.T, p *place) {
			check.NoError(t, errors.Join(os.Remove(p.host+p.dir+"/lib"), os.MkdirAll(p.host+p.order().DomainDir, 0o755)))
		}},
		"no bus": {wants: []string{"would end with it: connecting to systemd: no such luck"}, change: func(_ *testing.T, p *place) {
			p.Connect = func(context.Context) (Manager, error) { return nil, errors.New("no such luck") }
		}},
		"no ftclock on the host": {step: unknown, starts: 1, note: "the host has no ", wants: []string{"doesn't know ftclock-shim@" + id, "fix: install ftclock on the host"}, change: func(t *testing.T, p *place) {
			check.NoError(t, os.Remove(p.host+p.dir+"/shim"))
		}},
		"a masked unit": {step: masked, starts: 1, wants: []string{"would end with it", "UnitMasked"}},
		"another version": {starts: 1, note: "the host has ftclock-shim two and this container ftclock-shim one", change: func(t *testing.T, p *place) {
			p.program(t, p.host+p.dir+"/shim", "two")
		}},
		"another version that doesn't understand": {starts: 1, refused: "unknown field", note: "ftclock-shim two",
			wants: []string{"unknown field", "the host has ftclock-shim two", "fix: install the same version"}, change: func(t *testing.T, p *place) {
				p.program(t, p.host+p.dir+"/shim", "two")
			}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			step := c.step
			if step == nil {
				step = p.taken
			}
			if c.refused != "" {
				step = func() (string, error) {
					spawn.Refuse(p.State, id, errors.New(c.refused))
					return "failed", nil
				}
			}
			p.steps = append(p.steps, step)
			if c.change != nil {
				c.change(t, p)
			}
			err := p.Start(t.Context(), p.order())
			if len(c.wants) == 0 && err != nil || len(c.wants) > 0 && err == nil {
				t.Errorf("got %v", err)
			}
			for _, want := range c.wants {
				if err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nlacks %q", err, want)
				}
			}
			if p.starts != c.starts {
				t.Errorf("systemd was asked %d times", p.starts)
			}
			if notes := strings.Join(p.notes, "\n"); (notes == "") != (c.note == "") || !strings.Contains(notes, c.note) {
				t.Errorf("notes: %q", notes)
			}
		})
	}
}

// A shim beside a monitor that is left alone needs nothing of libvirt's directories.
func TestAWatchFromAContainer(t *testing.T) {
	p := newPlace(t)
	check.NoError(t, os.Remove(p.host+p.dir+"/lib"))
	p.steps = append(p.steps, p.taken)
	if err := p.Start(t.Context(), options); err != nil || p.starts != 1 {
		t.Errorf("%d starts, %v", p.starts, err)
	}
}

// What has the root directory of process 1 isn't in a container, and neither is who can't see it.
func TestContained(t *testing.T) {
	root, other := t.TempDir(), t.TempDir()
	link := filepath.Join(other, "root")
	check.NoError(t, os.Symlink(root, link))
	for _, c := range []struct {
		init string
		want bool
	}{{root, false}, {link, false}, {other, true}, {filepath.Join(other, "none"), false}, {"", false}} {
		if got := (Host{Root: root, InitRoot: c.init}).contained(); got != c.want {
			t.Errorf("process 1 has %s: %t", c.init, got)
		}
	}
	if System.Bus != "/run/dbus/system_bus_socket" || System.Root != "/" || System.InitRoot != "/proc/1/root" {
		t.Errorf("this host: %q, %q", System.Root, System.InitRoot)
	}
}

// A bus that comes from outside of this pid namespace isn't asked: its systemd can't know the pids that are meant.
func TestABusFromOutside(t *testing.T) {
	const inside = "FTCLOCK_BUS_FROM_OUTSIDE"
	if path := os.Getenv(inside); path != "" {
		direct := false
		h := Host{Booted: t.TempDir(), Bus: path,
			Connect: func(context.Context) (Manager, error) { return nil, errors.New("the bus is asked") },
			Direct:  func(context.Context, string, spawn.Spec) error { direct = true; return nil },
			Note:    func(_, warning string) { t.Error(warning) },
		}
		if err := h.Start(t.Context(), options); err != nil || !direct {
			t.Errorf("direct %t, %v", direct, err)
		}
		return
	}
	t.Chdir(t.TempDir()) // a socket's address is short; the directory of a test may not be
	bus, err := net.Listen("unix", "bus")
	if err != nil {
		t.Fatal(err)
	}
	defer bus.Close()
	if numberless("bus") || numberless("none") {
		t.Error("a bus of this pid namespace, or none, is from outside")
	}
	self := check.Value(os.Executable())(t)
	cmd := exec.Command(self, "-test.run=^TestABusFromOutside$")
	cmd.Env = append(os.Environ(), inside+"=bus")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a pid namespace of its own: %v\n%s", err, out)
	}
}
