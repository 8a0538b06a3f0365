package e2e

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/kvmhost"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// hostClocksource gives the host another clocksource for the rest of the test.
func hostClocksource(t *testing.T) (choose func(source string)) {
	t.Helper()
	if !kvmhost.Emulated() {
		privatelibvirt.LeaveOut(t, "the machine's clocksource isn't the tests' to change; fix: FTCLOCK_HOST=emulated")
	}
	choose = func(source string) {
		t.Helper()
		check.NoError(t, os.WriteFile("/sys/devices/system/clocksource/clocksource0/current_clocksource", []byte(source), 0))
	}
	t.Cleanup(func() { choose("tsc") })
	return choose
}

// A host whose clocksource becomes another one than the TSC has no stable kvmclock for its guests any more. Pauses are passed then,
// with a warning, and corrected again when the TSC is back. The guest's clock never goes back.
func TestKVMTheHostsClocksourceChanges(t *testing.T) {
	choose := hostClocksource(t)
	d, clock := start(t, managed("clocksource", clockElement))
	const length = 5 * time.Millisecond
	decisions := func(n int) (all []string) {
		t.Helper()
		records := status(t, d).Records
		for _, r := range records[len(records)-n:] {
			all = append(all, r.Decision.String()+": "+r.Reason.String())
		}
		return all
	}
	right, unstable := clockpage.Dropped.String()+": "+clockpage.InTolerance.String(), clockpage.Passed.String()+": "+clockpage.Unstable.String()
	all := func(n int, want, when string) {
		t.Helper()
		got := decisions(n)
		t.Logf("%s: %q", when, got)
		if slices.ContainsFunc(got, func(s string) bool { return s != want }) {
			t.Errorf("%s the pauses were %q, want %q", when, got, want)
		}
	}
	several := func() {
		t.Helper()
		pauses(t, d, 5, length)
	}

	several()
	all(4, right, "before")
	choose("hpet")
	several()
	all(5, unstable, "on hpet")
	if s := status(t, d); !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, clockpage.Unstable.String()) }) {
		t.Errorf("nothing warns of it: %q", s.Warnings)
	}
	statusSays := func(state control.State, code int) {
		t.Helper()
		cmd := ftclockCommand("status", "clocksource")
		out, _ := cmd.CombinedOutput()
		if s := status(t, d); s.State != state || cmd.ProcessState.ExitCode() != code {
			t.Errorf("it is %s, %q, and status exits with %d, want %s and %d:\n%s", s.State, s.Why, cmd.ProcessState.ExitCode(), state, code, out)
		}
	}
	statusSays(control.Uncorrected, 1)
	choose("tsc")
	pause(t, d, length) // the kernel looks at its clocksource when QEMU sets the guest's clock
	t.Logf("the first pause after it: %q", decisions(1))
	before := offset(t, clock)
	several()
	all(5, right, "on the TSC again")
	statusSays(control.Correcting, 0)
	check.Within(t, offset(t, clock)-before, maxDrift, "on the TSC again the guest lost")

	// The same within a pause, away and back. Until a vCPU runs or the clock is set, the kernel still calls it stable.
	for _, change := range [][2]string{{"tsc", "hpet"}, {"hpet", "tsc"}} {
		choose(change[0])
		check.NoError(t, d.Suspend())
		choose(change[1])
		time.Sleep(length)
		check.NoError(t, d.Resume())
		got := decisions(1)[0]
		t.Logf("from %s to %s within it: %s", change[0], change[1], got)
		if got == unstable == (change[0] == "tsc") {
			t.Errorf("from %s to %s within it the pause was %q", change[0], change[1], got)
		}
	}
	choose("tsc")
	pause(t, d, length)
	before = offset(t, clock)
	several()
	all(5, right, "in the end")
	check.Within(t, offset(t, clock)-before, maxDrift, "in the end the guest lost")
	domaintest.NoBacksteps(t, clock)
}

// A guest that is saved and restored again and again keeps its time, on a vCPU that came later, too.
func TestKVMRestoresAndAHotpluggedVCPU(t *testing.T) {
	image := linuxImage(t)
	file := saveFile(t, "again.state")
	x := linuxguest.XML("again", image, 2)
	x.VCPU = &libvirtxml.DomainVCPU{Value: 3, Current: 2}
	privatelibvirt.Manage(x, clockWith(`<ftclock:on event="restore" do="catch-up"/>`))
	d, clocks := boot(t, x)
	pauses(t, d, 5, 5*time.Millisecond)
	check.NoError(t, d.SetVcpusFlags(3, libvirt.DOMAIN_VCPU_LIVE))
	before := offset(t, clocks.Monotonic)
	pauses(t, d, 5, 5*time.Millisecond)
	s := status(t, d)
	for _, r := range s.Records[len(s.Records)-5:] {
		if r.Decision != clockpage.Dropped {
			t.Errorf("with the third vCPU: %+v", r)
		}
	}
	check.Within(t, offset(t, clocks.Monotonic)-before, maxDrift, "with the third vCPU it lost")

	times := 3
	if os.Getenv("FTCLOCK_LONG") == "1" {
		times = 10
	}
	for i := range times {
		_ = clocks.Close()
		mustVirsh(t, "save", d.Name, file)
		time.Sleep(time.Second)
		mustVirsh(t, "restore", file)
		clocks = linuxClocks(t, d)
		at := offset(t, clocks.Monotonic) - before
		pause(t, d, 5*time.Millisecond)
		pause(t, d, 5*time.Millisecond)
		later := offset(t, clocks.Monotonic) - before
		s := status(t, d)
		t.Logf("restore %d: %d ns lost, %d after two pauses; %s, TSC %s", i+1, at, later, s.Records[0].Decision, s.Records[0].TSC)
		check.Within(t, at, maxRestored, "it lost in %d restores", i+1)
		check.Within(t, later, maxDrift, "it lost in %d restores and the pauses after them", i+1)
		if r := s.Records[0]; r.Decision != clockpage.Anchored || r.TSC != clockpage.TSCMoved || s.State != control.Correcting {
			t.Errorf("the restore: %s, %+v", s.State, r)
		}
		if r := s.Records[2]; r.Decision != clockpage.Dropped {
			t.Errorf("the second pause after it: %+v", r)
		}
	}
	neverBack(t, clocks)
}
