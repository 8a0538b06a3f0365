package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

var (
	installedModule = filepath.Join(privatelibvirt.Prefix, "lib/ftclock/libftclock-qemu.so")
	installedShim   = filepath.Join(privatelibvirt.Prefix, "sbin/ftclock-shim")
)

// replaced puts a file of that text in the place of an installed one for the length of the test; "" takes it away.
func replaced(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.Rename(path, path+".real"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Rename(path+".real", path); err != nil {
			t.Error(err)
		}
	})
	if text != "" {
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
}

// withoutPtrace is a shim that lacks the right to trace.
var withoutPtrace = "#!/bin/sh\nexec setpriv --bounding-set=-sys_ptrace " + installedShim + ".real \"$@\"\n"

func TestKVMADomainThatCannotBeServed(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T)
		want  string // in virsh's message
	}{
		{"module is missing", func(t *testing.T) { replaced(t, installedModule, "", 0) },
			"finding libftclock-qemu.so: not at"},
		{"module is broken", func(t *testing.T) { replaced(t, installedModule, strings.Repeat("no ELF at all\n", 100), 0o644) },
			"invalid ELF header"},
		{"module is unreadable", func(t *testing.T) { replaced(t, installedModule, "x", 0o600) },
			"can't be read"},
		{"ptrace is refused", func(t *testing.T) { replaced(t, installedShim, withoutPtrace, 0o755) },
			"CAP_SYS_PTRACE"},
	} {
		t.Run(c.name+", required", func(t *testing.T) {
			c.spoil(t)
			define(t, managed("required", clockElement))
			failsToStart(t, "required", c.want)
		})
		t.Run(c.name+", not required", func(t *testing.T) {
			c.spoil(t)
			d := define(t, managed("optional", strings.Replace(clockElement, "/>", ` required="no"/>`, 1)))
			if out, err := virsh("start", "optional"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			clock, err := d.Clock()
			if err != nil {
				t.Fatal(err)
			}
			defer clock.Close()
			// Paused and resumed as with stock libvirt.
			for range 10 {
				if err := d.Suspend(); err != nil {
					t.Fatal(err)
				}
				if err := d.Resume(); err != nil {
					t.Fatal(err)
				}
			}
			if log := shimLog("optional"); !strings.Contains(log, `"level":"warn"`) || !strings.Contains(log, c.want) {
				t.Errorf("no warning in the log:\n%s", log)
			}
			if len(shims()) > 0 {
				if s := status(t, d); s.State != control.Uncorrected || !strings.Contains(s.Why, c.want) {
					t.Errorf("status: %+v", s)
				}
			}
		})
	}
}

// failsToStart starts the domain with virsh, which must fail with one line of ours that contains want.
func failsToStart(t *testing.T, name, want string) {
	t.Helper()
	out, err := virsh("start", name)
	if err == nil {
		t.Fatalf("%s started:\n%s", name, out)
	}
	var ours []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "ftclock") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	if len(ours) != 1 || !strings.Contains(ours[0], want) {
		t.Errorf("virsh says:\n%s\nwant one line of ours with %q", out, want)
	}
	t.Log(strings.Join(ours, "\n"))
	nothingLeft(t)
}

func TestKVMBadMetadataRefusesTheStart(t *testing.T) {
	const ns = `xmlns:ftclock="urn:ftclock:domain:1"`
	for name, c := range map[string]struct{ metadata, want string }{
		"unknown attribute": {`<ftclock:clock ` + ns + ` mode="fast"/>`, "@mode"},
		"unknown element":   {`<ftclock:clock ` + ns + `><ftclock:off/></ftclock:clock>`, "ftclock:off"},
		"unknown event":     {`<ftclock:clock ` + ns + `><ftclock:on event="reboot"/></ftclock:clock>`, "checkpoint"},
		"unknown unit":      {`<ftclock:clock ` + ns + `><ftclock:on event="checkpoint" limit="3 parsec"/></ftclock:clock>`, "@limit"},
		"negative limit":    {`<ftclock:clock ` + ns + `><ftclock:on event="checkpoint" limit="-1s"/></ftclock:clock>`, "@limit"},
		"absurd limit":      {`<ftclock:clock ` + ns + `><ftclock:on event="migrate" limit="16min"/></ftclock:clock>`, "15"},
		"two rules":         {`<ftclock:clock ` + ns + `><ftclock:on event="suspend"/><ftclock:on event="suspend"/></ftclock:clock>`, "suspend"},
		"foreign namespace": {`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:2"/>`, "urn:ftclock:domain:1"},
	} {
		t.Run(name, func(t *testing.T) {
			define(t, managed("bad", c.metadata))
			failsToStart(t, "bad", c.want)
		})
	}
}

// After the hook has done its part, QEMU itself may still fail to start.
func TestKVMNothingIsLeftOfAQEMUThatDoesNotStart(t *testing.T) {
	x := managed("doomed", clockElement)
	privatelibvirt.AddArguments(x, "-no-such-option")
	define(t, x)
	if out, err := virsh("start", "doomed"); err == nil {
		t.Fatalf("it started:\n%s", out)
	} else if !strings.Contains(out, "no-such-option") {
		t.Errorf("QEMU's own message is missing:\n%s", out)
	}
	nothingLeft(t)
}

// otherModule is the text of a module with another version of the clock page.
func otherModule(t *testing.T, name string) string {
	t.Helper()
	path, err := built.Path(name)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A module and a shim of different versions work together, or the shim says why not and goes on relaying.
func TestKVMAModuleOfAnotherVersion(t *testing.T) {
	t.Run("older", func(t *testing.T) {
		replaced(t, installedModule, otherModule(t, built.ModuleOlder), 0o644)
		d, clock := start(t, managed("older", clockElement))
		before := offset(t, clock)
		for range 50 {
			pause(t, d, 5*time.Millisecond)
		}
		lostAsRecorded(t, clock, before, nil)
		if s := status(t, d); s.State != control.Correcting || s.Disagreements != 0 || len(s.Warnings) > 0 {
			t.Errorf("status: %+v", withoutRecords(s))
		}
	})
	const want = "clock page has version 2."
	t.Run("newer", func(t *testing.T) {
		replaced(t, installedModule, otherModule(t, built.ModuleNext), 0o644)
		d, _ := start(t, managed("newer", strings.Replace(clockElement, "/>", ` required="no"/>`, 1)))
		for range 10 {
			pause(t, d, 5*time.Millisecond)
		}
		if s := status(t, d); s.State != control.Uncorrected || !strings.Contains(s.Why, want) {
			t.Errorf("status: %+v", withoutRecords(s))
		}
		out, err := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", "status", "newer").CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), want) {
			t.Errorf("%v\n%s", err, out)
		}
		if err := d.Destroy(); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t)
		define(t, managed("strict", clockElement))
		failsToStart(t, "strict", want)
	})
	t.Run("newer, attached", func(t *testing.T) {
		t.Cleanup(func() { nothingLeft(t) })
		replaced(t, installedModule, otherModule(t, built.ModuleNext), 0o644)
		qemu, monitor := bareQEMU(t, "engine")
		out, err := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", "attach", strconv.Itoa(qemu.Process.Pid)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v\n%s", err, out)
		}
		for _, command := range []string{"stop", "cont"} {
			execute(t, monitor, command, nil)
		}
	})
}

// A QEMU whose main thread is busy for longer than an attempt to load the module takes starts all the same, if late. Where the
// module isn't required, the guest is served once that can be.
func TestKVMABusyQEMUStartsLate(t *testing.T) {
	library, err := built.Copy(built.Busy, privatelibvirt.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, required := range []string{"yes", "no"} {
		t.Run("required "+required, func(t *testing.T) {
			x := managed("busy-"+required, `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="`+required+`"/>`)
			x.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{Envs: []libvirtxml.DomainQEMUCommandlineEnv{
				{Name: "LD_PRELOAD", Value: library}, {Name: "FTCLOCK_BUSY_SECONDS", Value: "20"},
			}}
			d, clock := start(t, x)
			for end := time.Now().Add(2 * time.Minute); status(t, d).State != control.Correcting; time.Sleep(time.Second) {
				if required == "yes" || time.Now().After(end) {
					t.Fatalf("it runs, and isn't served: %+v", status(t, d))
				}
			}
			before := offset(t, clock)
			for range 20 {
				pause(t, d, 5*time.Millisecond)
			}
			if drift := offset(t, clock) - before; drift > maxDrift || drift < -maxDrift {
				t.Errorf("drift of %d ns", drift)
			}
		})
	}
}

// A manager that writes a domain's definition anew, without what it doesn't know, is noticed at the next start.
func TestKVMADefinitionWrittenAnew(t *testing.T) {
	const name = "anew"
	d := define(t, managed(name, clockElement))
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	if err := d.Destroy(); err != nil {
		t.Fatal(err)
	}
	x := privatelibvirt.GuestXML(name, elf)
	uuid, err := d.GetUUIDString()
	if err != nil {
		t.Fatal(err)
	}
	x.UUID = uuid
	if _, err := privatelibvirt.Define(conn, x); err != nil {
		t.Fatal(err)
	}
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"status", "doctor"} {
		out, err := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", command).CombinedOutput()
		if err == nil || !strings.Contains(string(out), name) {
			t.Errorf("ftclock %s: %v\n%s", command, err, out)
		}
	}
	ftclock(t, "disable", name)
	if out := ftclock(t, "status"); strings.Contains(out, name) {
		t.Errorf("disabled, and told of all the same:\n%s", out)
	}
}

// Another tool's hook may fail behind ours, or take its time when a domain has gone: nothing of ours is left behind, and the next
// start works.
func TestKVMAnotherHook(t *testing.T) {
	other := filepath.Join(privatelibvirt.HooksDir, "60-other")
	hook := func(text string) {
		t.Helper()
		if err := os.WriteFile(other, []byte("#!/bin/sh\ncat >/dev/null\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.Remove(other) })
	d := define(t, managed("hooked", clockElement))
	for _, operation := range []string{"start", "started"} {
		hook(`[ "$2" != ` + operation + ` ]`)
		if err := d.Create(); err == nil {
			t.Fatalf("the domain starts although a hook fails at %s", operation)
		}
		nothingLeft(t)
	}
	hook(`[ "$2" != release ] || sleep 8`)
	for range 2 {
		if err := d.Create(); err != nil {
			t.Fatal(err)
		}
		clock, err := d.Clock()
		if err != nil {
			t.Fatal(err)
		}
		before := offset(t, clock)
		for range 10 {
			pause(t, d, 5*time.Millisecond)
		}
		if drift := offset(t, clock) - before; drift > maxDrift || drift < -maxDrift {
			t.Errorf("drift of %d ns", drift)
		}
		clock.Close()
		if err := d.Destroy(); err != nil {
			t.Fatal(err)
		}
	}
	nothingLeft(t)
}
