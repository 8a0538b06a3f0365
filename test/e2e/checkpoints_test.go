package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"
)

// manyTimes is how many checkpoints a test makes: more than the module's ring holds, and with FTCLOCK_LONG=1 a thousand.
var manyTimes = func() int {
	if os.Getenv("FTCLOCK_LONG") == "1" {
		return 1000
	}
	return 400
}()

// checkpoints pauses the guest many times, for 1 to 20 ms each, and gives what is wrong with its clock afterwards,
// "" if nothing is. It doesn't fail the test: one test relies on its finding something.
func checkpoints(t *testing.T, clock *guest.Clock, stop, cont func() error) string {
	t.Helper()
	random, _ := check.Random(t)
	before := offset(t, clock)
	var drifts []int64
	for range 4 {
		for range manyTimes / 4 {
			check.NoError(t, stop())
			time.Sleep(time.Millisecond + time.Duration(random.IntN(19_000))*time.Microsecond)
			check.NoError(t, cont())
		}
		drifts = append(drifts, offset(t, clock)-before)
	}
	t.Logf("drift in ns after each quarter: %v", drifts)
	backsteps, largest, err := clock.Backsteps()
	if err != nil {
		t.Fatal(err)
	}
	var wrong []string
	for i, drift := range drifts {
		if guest.Off(drift) {
			wrong = append(wrong, fmt.Sprintf("drift of %d ns after quarter %d", drift, i+1))
		}
	}
	if growth := drifts[3] - drifts[0]; guest.Off(growth) {
		wrong = append(wrong, fmt.Sprintf("drift grows by %d ns", growth))
	}
	if backsteps > 0 {
		wrong = append(wrong, fmt.Sprintf("the guest saw time go back %d times, by up to %d ns", backsteps, largest))
	}
	return strings.Join(wrong, "; ")
}

// stopAndCont are those commands on a monitor, for checkpoints.
func stopAndCont(monitor *qmp.Conn) (stop, cont func() error) {
	return func() error { return monitor.Run("stop") }, func() error { return monitor.Run("cont") }
}

// wellKept checks what the shim says after the checkpoints.
func wellKept(t *testing.T, s *control.Status, method string) {
	t.Helper()
	if s.State != control.Correcting || s.Method != method || s.Dropped+s.Anchored < uint64(manyTimes) || s.Held != 0 ||
		s.Disagreements != 0 || len(s.Warnings) != 0 || s.Busy != 0 || s.Reanchored != 0 {
		records := s.Records
		s.Records = nil
		t.Errorf("status: %+v", s)
		t.Logf("last records: %+v", records[max(0, len(records)-5):])
	}
	t.Logf("%s: %d dropped, %d anchored, worst residual %d ns, worst cost %d ns, caught up %v",
		s.Method, s.Dropped, s.Anchored, s.WorstResidual, s.WorstCost, time.Duration(s.CaughtUp))
}

func TestKVMCheckpointsWithMetadataOnly(t *testing.T) {
	d, clock := start(t, managed("metadata", clockElement))
	if wrong := checkpoints(t, clock, d.Suspend, d.Resume); wrong != "" {
		t.Error(wrong)
	}
	s := status(t, d)
	wellKept(t, s, "ptrace")
	if s.Orders < uint64(manyTimes) || s.StaleOrders != 0 {
		t.Errorf("%d orders were followed, %d were stale", s.Orders, s.StaleOrders)
	}
	for _, r := range s.Records {
		if r.Ordered == 1 && (r.OrderLost == 0 || int64(r.OrderLost) > r.Lost+int64(20*time.Millisecond)) {
			t.Errorf("the shim and the module don't agree: %+v", r)
		}
	}
}

func TestKVMCheckpointsWithPreload(t *testing.T) {
	d := define(t, privatelibvirt.GuestXML("preload", elf))
	ftclock(t, "enable", "preload", "--preload")
	clock := domaintest.StartClock(t, d)
	if wrong := checkpoints(t, clock, d.Suspend, d.Resume); wrong != "" {
		t.Error(wrong)
	}
	wellKept(t, status(t, d), "preload")
}

func TestKVMCheckpointsAfterEnableLive(t *testing.T) {
	d, clock := start(t, privatelibvirt.GuestXML("live", elf))
	// It has a past without ftclock.
	pauses(t, d, 10, 5*time.Millisecond)
	ftclock(t, "enable", "live", "--live")
	if wrong := checkpoints(t, clock, d.Suspend, d.Resume); wrong != "" {
		t.Error(wrong)
	}
	s := status(t, d)
	wellKept(t, s, "ptrace")
	if s.Mode != control.Watch {
		t.Errorf("mode is %s", s.Mode)
	}
}

// bareQEMU starts a QEMU that libvirt knows nothing of; it goes with the test.
func bareQEMU(t *testing.T, name string, args ...string) (*exec.Cmd, *qmp.Conn) {
	t.Helper()
	qemu, monitor, err := privatelibvirt.BareQEMU(name, elf, args...)
	check.NoError(t, err)
	t.Cleanup(func() {
		_ = monitor.Close()
		_ = qemu.Process.Kill()
		_ = qemu.Wait()
	})
	return qemu, monitor
}

func TestKVMCheckpointsOfAnAttachedQEMU(t *testing.T) {
	const name = "engine's own"
	t.Cleanup(func() { nothingLeft(t) })
	qemu, monitor := bareQEMU(t, name)
	clock := domaintest.ClockOfProcess(t, qemu.Process.Pid)
	pid := strconv.Itoa(qemu.Process.Pid)
	if out := ftclock(t, "attach", pid); !strings.Contains(out, name) {
		t.Errorf("it isn't named:\n%s", out)
	}
	stop, cont := stopAndCont(monitor)
	if wrong := checkpoints(t, clock, stop, cont); wrong != "" {
		t.Error(wrong)
	}
	if out := ftclock(t, "status"); !strings.Contains(out, name) || !strings.Contains(out, "correcting") {
		t.Errorf("status:\n%s", out)
	}
	// No monitor told the shim of them, and the module's ring holds 256.
	var all []control.Status
	if err := json.Unmarshal([]byte(ftclock(t, "status", name, "--format", "json")), &all); err != nil || len(all) != 1 {
		t.Fatal(err, len(all))
	}
	if kept := all[0].Kept; kept == nil || kept.Missed != 0 || kept.Pauses < uint64(manyTimes) {
		t.Errorf("the record: %+v", kept)
	}
	if out := ftclock(t, "detach", pid); !strings.Contains(out, "no longer corrected") {
		t.Errorf("detach:\n%s", out)
	}
	before := offset(t, clock)
	for range 5 {
		check.NoError(t, errors.Join(stop(), cont()))
	}
	if lost := offset(t, clock) - before; lost <= maxDrift {
		t.Errorf("it is corrected still: %d ns lost", lost)
	}
}

func TestKVMCheckpointsOverASecondMonitor(t *testing.T) {
	d, clock, monitor := startWithMonitor(t, "second")
	stop, cont := stopAndCont(monitor)
	if wrong := checkpoints(t, clock, stop, cont); wrong != "" {
		t.Error(wrong)
	}
	s := status(t, d)
	wellKept(t, s, "ptrace")
	if s.Orders > 1 {
		t.Errorf("%d orders for pauses that the shim doesn't carry", s.Orders)
	}
}

// The test that proves the tests above: with the correction switched off the same check must find the loss.
func TestKVMCheckpointsSwitchedOffDrift(t *testing.T) {
	d, clock := start(t, managed("off", clockElement))
	ftclock(t, "disable", "off", "--live")
	wrong := checkpoints(t, clock, d.Suspend, d.Resume)
	if !strings.Contains(wrong, "drift of") {
		t.Errorf("without the correction the check finds: %q", wrong)
	}
	if s := status(t, d); s.State != control.Watching || s.Held < uint64(manyTimes) || s.Dropped+s.Anchored > 0 {
		t.Errorf("status: %+v", s)
	}
}

// ftclock runs the installed command line, which must succeed, and gives what it prints.
func ftclock(t *testing.T, args ...string) string {
	t.Helper()
	out := check.Output(t, ftclockCommand(args...))
	t.Logf("ftclock %s:\n%s", strings.Join(args, " "), out)
	return string(out)
}
