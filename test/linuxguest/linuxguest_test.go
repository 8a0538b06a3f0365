package linuxguest

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"ftclock/test/kvmhost"
)

func TestParseLog(t *testing.T) {
	log := parseLog("SeaBIOS (version 1.16)\r\n" +
		"ftclock init cpus=1 available=kvm-clock \r\n" +
		"ftclock clock realtime=1785500000123456789 monotonic=987654321 tsc=123 source=kvm-clock \r\n" +
		"ftclock kernel rcu: INFO: rcu_sched self-detected stall on CPU\r\n" +
		"ftclock kernel Linux version 6.12, debugging symbols\r\n" +
		"ftclock kernel PCI: if necessary, use \"pci=nocrs\" and report a bug\r\n" +
		"ftclock kernel clocksource: timekeeping watchdog on CPU0: hpet wd-wd read-back delay of 250000ns, clock-skew test skipped!\r\n" +
		"ftclock kernel clocksource: timekeeping watchdog on CPU0: wd-tsc-wd excessive read-back delay of 210000ns vs. limit of 125000ns," +
		" wd-wd read-back delay only 90000ns, attempt 3, marking tsc unstable\r\n" +
		"ftclock kernel tsc: Marking TSC unstable due to clocksource watchdog\r\n" +
		"ftclock kernel clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large:\r\n" +
		"ftclock clock realtime=17855000001234567890000000 monotonic=1 tsc=1 source=x\r\n" +
		"watchdog: BUG: soft lockup\r\n" +
		"ftclock clock realtime=1785500000123456790 monotonic=987654322 tsc=124 source=kvm-clo") // which it is writing
	want := []Line{{Realtime: 1785500000123456789, Monotonic: 987654321, TSC: 123, Source: "kvm-clock"}}
	if !reflect.DeepEqual(log.Lines, want) {
		t.Errorf("lines %+v", log.Lines)
	}
	if len(log.Complaints) != 3 || !strings.Contains(log.Complaints[0], "stall") || !strings.Contains(log.Complaints[1], "skew is too large") ||
		!strings.Contains(log.Complaints[2], "lockup") {
		t.Errorf("complaints %q", log.Complaints)
	}
}

func TestMissingNamesTheFix(t *testing.T) {
	t.Setenv(kvmhost.GuestKernelVariable, filepath.Join(t.TempDir(), "none"))
	missing := fmt.Sprint(Missing())
	if !strings.Contains(missing, kvmhost.GuestKernelVariable) || !strings.Contains(missing, "fix:") {
		t.Error(missing)
	}
}
