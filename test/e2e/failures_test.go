package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
)

var (
	installedModule = filepath.Join(privatelibvirt.Prefix, "lib/ftclock/libftclock-qemu.so")
	installedShim   = filepath.Join(privatelibvirt.Prefix, "sbin/ftclock-shim")
)

// replaced puts a file of that text in the place of an installed one for the length of the test; "" takes it away.
func replaced(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	check.NoError(t, os.Rename(path, path+".real"))
	t.Cleanup(func() {
		if err := os.Rename(path+".real", path); err != nil {
			t.Error(err)
		}
	})
	if text != "" {
		check.NoError(t, os.WriteFile(path, []byte(text), mode))
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
			mustVirsh(t, "start", "optional")
			_ = domaintest.Clock(t, d)
			// Paused and resumed as with stock libvirt.
			for range 10 {
				check.NoError(t, d.Suspend())
				check.NoError(t, d.Resume())
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
	return string(check.Value(os.ReadFile(check.Value(built.Path(name))(t)))(t))
}

// A module and a shim of different versions work together, or the shim says why not and goes on relaying.
func TestKVMAModuleOfAnotherVersion(t *testing.T) {
	t.Run("older", func(t *testing.T) {
		replaced(t, installedModule, otherModule(t, built.ModuleOlder), 0o644)
		d, clock := start(t, managed("older", clockElement))
		before := offset(t, clock)
		pauses(t, d, 50, 5*time.Millisecond)
		lostAsRecorded(t, clock, before, nil)
		if s := status(t, d); s.State != control.Correcting || s.Disagreements != 0 || len(s.Warnings) > 0 {
			t.Errorf("status: %+v", withoutRecords(s))
		}
	})
	const want = "clock page has version 2."
	t.Run("newer", func(t *testing.T) {
		replaced(t, installedModule, otherModule(t, built.ModuleNext), 0o644)
		d, _ := start(t, managed("newer", strings.Replace(clockElement, "/>", ` required="no"/>`, 1)))
		pauses(t, d, 10, 5*time.Millisecond)
		if s := status(t, d); s.State != control.Uncorrected || !strings.Contains(s.Why, want) {
			t.Errorf("status: %+v", withoutRecords(s))
		}
		says(t, 1, want, "status", "newer")
		ended(t, d)
		define(t, managed("strict", clockElement))
		failsToStart(t, "strict", want)
	})
	t.Run("newer, attached", func(t *testing.T) {
		t.Cleanup(func() { nothingLeft(t) })
		replaced(t, installedModule, otherModule(t, built.ModuleNext), 0o644)
		qemu, monitor := bareQEMU(t, "engine")
		out, err := ftclockCommand("attach", strconv.Itoa(qemu.Process.Pid)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v\n%s", err, out)
		}
		check.NoError(t, monitor.Run("stop", "cont"))
	})
}

// A QEMU whose main thread is busy for longer than an attempt to load the module takes starts all the same, if late. Where the
// module isn't required, the guest is served once that can be.
func TestKVMABusyQEMUStartsLate(t *testing.T) {
	library := check.Value(built.Copy(built.Busy, privatelibvirt.Dir))(t)
	for _, required := range []string{"yes", "no"} {
		t.Run("required "+required, func(t *testing.T) {
			x := managed("busy-"+required, `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="`+required+`"/>`)
			privatelibvirt.SetEnvironment(x, [2]string{"LD_PRELOAD", library}, [2]string{"FTCLOCK_BUSY_SECONDS", "20"})
			d, clock := start(t, x)
			for end := time.Now().Add(2 * time.Minute); status(t, d).State != control.Correcting; time.Sleep(time.Second) {
				if required == "yes" || time.Now().After(end) {
					t.Fatalf("it runs, and isn't served: %+v", status(t, d))
				}
			}
			holds(t, d, clock, 20)
		})
	}
}

// A manager that writes a domain's definition anew, without what it doesn't know, is noticed at the next start.
func TestKVMADefinitionWrittenAnew(t *testing.T) {
	const name = "anew"
	d := define(t, managed(name, clockElement))
	check.NoError(t, d.Create())
	check.NoError(t, d.Destroy())
	x := privatelibvirt.GuestXML(name, elf)
	x.UUID = domaintest.UUID(t, d)
	check.Value(privatelibvirt.Define(conn, x))(t)
	check.NoError(t, d.Create())
	for _, command := range []string{"status", "doctor"} {
		out, err := ftclockCommand(command).CombinedOutput()
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
		check.NoError(t, os.WriteFile(other, []byte("#!/bin/sh\ncat >/dev/null\n"+text+"\n"), 0o755))
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
		clock := domaintest.StartClock(t, d)
		holds(t, d, clock, 10)
		clock.Close()
		check.NoError(t, d.Destroy())
	}
	nothingLeft(t)
}
