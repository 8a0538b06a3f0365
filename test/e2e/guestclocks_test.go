package e2e

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

// The distribution's own kernel on each kind of clock. One that follows kvmclock is kept; with any other the guest loses its pauses, and
// everything that speaks of its clock says so, on hpet after three minutes of it (FTCLOCK_LONG=1).
func TestKVMGuestClocks(t *testing.T) {
	image := linuxImage(t)
	for _, c := range []struct {
		name, source string
		kept         bool
		change       func(*libvirtxml.Domain)
		clock        control.GuestClock
	}{
		{"kvmclock", "kvm-clock", true, func(*libvirtxml.Domain) {}, control.KVMClock},
		// Windows' way. libvirt would have these features by name, but in an emulated host it doesn't know which there are.
		{"hyperv", "hyperv_clocksource_tsc_page", true, func(x *libvirtxml.Domain) {
			x.CPU = nil
			privatelibvirt.AddArguments(x, "-cpu", "host,kvm=off,hv-relaxed=on,hv-vapic=on,hv-spinlocks=8191,hv-vpindex=on,hv-runtime=on,hv-time=on,hv-synic=on,hv-stimer=on")
		}, control.HyperVPage},
		// SeaBIOS switches kvmclock on where it is offered, and leaves it on: what Linux makes of that can't be seen.
		{"acpi_pm", "acpi_pm", false, func(x *libvirtxml.Domain) { x.Clock.Timer[0].Present = "no" }, control.NoClockYet},
		{"hpet", "hpet", false, func(x *libvirtxml.Domain) {
			x.Clock.Timer[0].Present = "no"
			x.Clock.Timer = append(x.Clock.Timer, libvirtxml.DomainTimer{Name: "hpet", Present: "yes"})
		}, control.NoClock},
	} {
		if (c.name == "hpet" || c.name == "kvmclock") && os.Getenv("FTCLOCK_LONG") != "1" {
			continue // the one loses what acpi_pm does, and takes minutes; TestKVMLinuxGuest has the other
		}
		t.Run(c.name, func(t *testing.T) {
			x := linuxguest.XML("clock-"+c.name, image, 1)
			x.Metadata = &libvirtxml.DomainMetadata{XML: clockWith(`<ftclock:on event="restore" do="catch-up"/>`)}
			source := "clocksource=" + c.source
			if !c.kept {
				source = "clocksource=tsc tsc=reliable ftclock_source=" + c.source // see init.c
			}
			x.OS.Cmdline = strings.Replace(x.OS.Cmdline, "clocksource=kvm-clock", source, 1)
			c.change(x)
			d, clocks := boot(t, x)

			offsets := func(clocks *linuxguest.Clocks) [2]int64 {
				if !c.kept {
					return [2]int64{roughOffset(t, clocks.Monotonic), roughOffset(t, clocks.Realtime)}
				}
				return [2]int64{offset(t, clocks.Monotonic), offset(t, clocks.Realtime)}
			}
			const pauses, length = 50, 10 * time.Millisecond
			before := offsets(clocks)
			for range pauses {
				pause(t, d, length)
			}
			after := offsets(clocks)
			for i, name := range []string{"CLOCK_MONOTONIC", "CLOCK_REALTIME"} {
				lost := after[i] - before[i]
				t.Logf("%s by %s: %s lost %d ns of %d ns paused", c.name, c.source, name, lost, pauses*int64(length))
				if c.kept && (lost > maxDrift || lost < -maxDrift) || !c.kept && lost < pauses*int64(length)*9/10 {
					t.Errorf("%s lost %d ns", name, lost)
				}
			}
			log, err := linuxguest.ReadLog(linuxguest.Console(d.Name))
			if err != nil || len(log.Lines) == 0 || log.Lines[len(log.Lines)-1].Source != c.source {
				t.Errorf("the guest's clock source isn't %s: %v, %+v", c.source, err, log.Lines)
			}

			if c.kept {
				if err := d.ManagedSave(0); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * time.Second)
				if err := d.Create(); err != nil {
					t.Fatal(err)
				}
				restored := linuxClocks(t, d)
				at := offsets(restored)
				pause(t, d, length)
				later := offsets(restored)
				t.Logf("%s by %s: lost %d ns at a restore, %d ns after the next pause", c.name, c.source, at[0]-after[0], later[0]-after[0])
				if lost := at[0] - after[0]; lost > maxWritten || lost < -maxWritten {
					t.Errorf("lost %d ns at a restore", lost)
				}
				if lost := later[0] - after[0]; lost > maxDrift || lost < -maxDrift {
					t.Errorf("lost %d ns in all", lost)
				}
			}

			// What it reads is not kept from when it has run for so long.
			if c.clock == control.NoClock {
				for end := time.Now().Add(2 * control.UnkeptAfter); status(t, d).State == control.Correcting && time.Now().Before(end); time.Sleep(5 * time.Second) {
					pause(t, d, length)
				}
			}
			s := status(t, d)
			t.Logf("%s, %s: %s", c.name, s.State, s.GuestClock)
			if s.GuestClock != c.clock || (s.State == control.Unkept) != (c.clock == control.NoClock) {
				t.Errorf("the domain is %s, its guest's clock %q", s.State, s.GuestClock)
			}
			switch c.clock {
			case control.KVMClock:
				says(t, 0, "kvmclock is on", "status", d.Name)
				says(t, 0, "kvmclock holds", "verify", d.Name)
			case control.HyperVPage:
				says(t, 0, "Hyper-V's reference time is on", "status", d.Name)
				says(t, 0, "Hyper-V's reference time holds", "verify", d.Name)
			case control.NoClockYet:
				says(t, 0, "none that ftclock keeps yet", "status", d.Name)
				says(t, 3, "none that ftclock keeps yet", "verify", d.Name)
			case control.NoClock:
				says(t, 1, "not kept", "status", d.Name)
				says(t, 1, "not kept", "verify", d.Name)
				says(t, 0, "no clock that ftclock keeps", "report", d.Name, "--format", "json")
			}
		})
	}
}

// says checks a command's exit code, and that it says this.
func says(t *testing.T, code int, what string, args ...string) {
	t.Helper()
	cmd := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != code || !strings.Contains(string(out), what) {
		t.Errorf("ftclock %s: %v, want exit code %d and %q\n%s", strings.Join(args, " "), err, code, what, out)
	}
	if !slices.Contains(args, "json") {
		t.Logf("ftclock %s:\n%s", strings.Join(args, " "), out)
	}
}
