package e2e

import (
	"cmp"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// linuxOffsets are how far CLOCK_MONOTONIC and CLOCK_REALTIME are behind CLOCK_MONOTONIC_RAW on each vCPU, in ns. The first vCPU's
// CLOCK_MONOTONIC is measured from outside. The others rest for most of the time, and on an emulated host with fewer processors
// they are seen late when they don't: their clocks are compared with that one inside the guest.
func linuxOffsets(t *testing.T, clocks *linuxguest.Clocks) (all [][2]int64) {
	t.Helper()
	first := roughOffset(t, clocks.Monotonic)
	// No offset is too small. To look for longer would take the processors from a guest that has more vCPUs than its host.
	for range 4 {
		first = min(first, roughOffset(t, clocks.Monotonic))
	}
	for _, cpu := range clocks.CPUs {
		var both [2]int64
		for i, c := range []*guest.Clock{cpu.Monotonic, cpu.Realtime} {
			ahead, err := c.Ahead(clocks.Monotonic)
			if err != nil {
				t.Fatal(err)
			}
			both[i] = first - ahead
		}
		all = append(all, both)
	}
	return all
}

// roughOffset is how far a guest's clock is behind CLOCK_MONOTONIC_RAW, in ns, after a short look: too large on a busy machine.
func roughOffset(t *testing.T, clock *guest.Clock) int64 {
	t.Helper()
	offset, _, err := clock.Offset(100 * time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	return offset
}

// linuxImage is what a Linux guest boots.
func linuxImage(t *testing.T) *linuxguest.Image {
	t.Helper()
	if missing := linuxguest.Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	image, err := linuxguest.Build(privatelibvirt.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// boot defines and starts a domain with a Linux guest, and waits until its init runs. Both go with the test.
func boot(t *testing.T, x *libvirtxml.Domain) (*privatelibvirt.Domain, *linuxguest.Clocks) {
	t.Helper()
	d := define(t, x)
	return d, open(t, d)
}

// open starts a domain with a Linux guest, and gives its clocks, which go with the test. On an emulated host one hung while it
// booted: that is said, and it is booted once more.
func open(t *testing.T, d *privatelibvirt.Domain) *linuxguest.Clocks {
	t.Helper()
	if err := d.Create(); err != nil {
		t.Fatal(err)
	}
	clocks, err := awaitLinux(d)
	if err != nil && kvmhost.Emulated() {
		t.Logf("THE GUEST HUNG, and is booted once more: %v", err)
		doing(t, d)
		if err := d.Destroy(); err != nil {
			t.Fatal(err)
		}
		if err := d.Create(); err != nil {
			t.Fatal(err)
		}
		clocks, err = awaitLinux(d)
	}
	return opened(t, d, clocks, err)
}

// linuxClocks waits for the clocks of a Linux guest that has been started, which go with the test.
func linuxClocks(t *testing.T, d *privatelibvirt.Domain) *linuxguest.Clocks {
	t.Helper()
	clocks, err := awaitLinux(d)
	return opened(t, d, clocks, err)
}

// awaitLinux waits until the guest's init runs, for six minutes, unless it never will.
func awaitLinux(d *privatelibvirt.Domain) (*linuxguest.Clocks, error) {
	pid, err := d.PID()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	for {
		clocks, err := linuxguest.Open(pid, 10*time.Second)
		if err == nil {
			return clocks, nil
		}
		if why := dead(d); why != "" || time.Since(began) > 6*time.Minute {
			return nil, fmt.Errorf("%w: %s after %.0f s", err, cmp.Or(why, "nothing more is known"), time.Since(began).Seconds())
		}
	}
}

// dead says why a Linux guest won't go on; "" where it may yet.
func dead(d *privatelibvirt.Domain) string {
	if console, _ := os.ReadFile(linuxguest.Console(d.Name)); strings.Contains(string(console), "Kernel panic") {
		return "its kernel panicked"
	}
	registers, _ := d.QemuMonitorCommand("info registers", libvirt.DOMAIN_QEMU_MONITOR_COMMAND_HMP)
	found := regexp.MustCompile(`RFL=([0-9a-f]+) .*HLT=1`).FindStringSubmatch(registers)
	if found == nil {
		return ""
	}
	const interrupts = 1 << 9
	if flags, err := strconv.ParseUint(found[1], 16, 64); err != nil || flags&interrupts != 0 {
		return ""
	}
	return "it halted with interrupts off, as the kernel's decompressor does after an error"
}

func opened(t *testing.T, d *privatelibvirt.Domain, clocks *linuxguest.Clocks, err error) *linuxguest.Clocks {
	t.Helper()
	if err != nil {
		doing(t, d)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			doing(t, d)
		}
		clocks.Close()
	})
	return clocks
}

// doing logs what a Linux guest is doing, for a test that failed: whether it runs, where its vCPUs are, twice, and what it said last.
func doing(t *testing.T, d *privatelibvirt.Domain) {
	for _, command := range []string{"info status", "info registers -a", "info registers -a", "info irq"} {
		answer, err := d.QemuMonitorCommand(command, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_HMP)
		t.Logf("%s: %v %q", command, err, regexp.MustCompile(`VM status.*|RIP=.*|CPU#\d+|\d+: \d+`).FindAllString(answer, -1))
	}
	console, err := os.ReadFile(linuxguest.Console(d.Name))
	lines := strings.Split(string(console), "\n")
	t.Logf("its console: %v\n%s", err, strings.Join(lines[max(0, len(lines)-20):], "\n"))
}

// The distribution's own kernel on kvm-clock loses the pauses with stock QEMU. With ftclock it keeps its clocks, on every vCPU,
// and no vCPU sees time go back, on its own or against another. One test for each number of vCPUs: guests with several are what
// an emulated host crashes with most, and what has passed isn't run again.
func TestKVMLinuxGuest(t *testing.T) {
	t.Run("stock", func(t *testing.T) { pauseLinux(t, "", 1, 20) })
	t.Run("ftclock", func(t *testing.T) { pauseLinux(t, clockElement, 1, linuxPauses()) })
}

func TestKVMLinuxGuestOfTwoVCPUs(t *testing.T) { pauseLinux(t, clockElement, 2, linuxPauses()) }

func TestKVMLinuxGuestOfFourVCPUs(t *testing.T) { pauseLinux(t, clockElement, 4, linuxPauses()) }

func linuxPauses() int {
	if os.Getenv("FTCLOCK_LONG") == "1" {
		return 1000
	}
	return 100
}

// pauseLinux boots a stock Linux with so many vCPUs, pauses it so often, and checks its clocks and its log. Without metadata it
// checks that the pauses are lost.
func pauseLinux(t *testing.T, metadata string, vcpus uint, pauses int) {
	x := linuxguest.XML(fmt.Sprintf("linux-%d", vcpus), linuxImage(t), vcpus)
	if metadata != "" {
		x.Metadata = &libvirtxml.DomainMetadata{XML: metadata}
	}
	d, clocks := boot(t, x)
	if len(clocks.CPUs) != int(vcpus) {
		t.Fatalf("the guest has %d vCPUs", len(clocks.CPUs))
	}

	// What it said while it booted isn't ftclock's: on several vCPUs an emulated host's TSC isn't as synchronous as a real one's.
	booted, err := linuxguest.ReadLog(linuxguest.Console(d.Name))
	if err != nil {
		t.Fatal(err)
	}
	const length = 5 * time.Millisecond
	before := linuxOffsets(t, clocks)
	for range pauses {
		pause(t, d, length)
	}
	after := linuxOffsets(t, clocks)
	paused := int64(pauses) * int64(length)
	for cpu := range after {
		for i, name := range []string{"CLOCK_MONOTONIC", "CLOCK_REALTIME"} {
			lost := after[cpu][i] - before[cpu][i]
			t.Logf("vCPU %d: %s lost %d ns of %d ns paused", cpu, name, lost, paused)
			if metadata == "" && lost < paused*9/10 {
				t.Errorf("%s lost only %d ns of %d: the measuring doesn't work, or something corrects the clock", name, lost, paused)
			}
			if metadata != "" && (lost > maxDrift || lost < -maxDrift) {
				t.Errorf("vCPU %d: %s lost %d ns", cpu, name, lost)
			}
		}
	}

	log, err := linuxguest.ReadLog(linuxguest.Console(d.Name))
	if err != nil {
		t.Fatal(err)
	}
	if len(log.Lines) == 0 || log.Lines[len(log.Lines)-1].Source != "kvm-clock" {
		t.Errorf("the guest's clock source isn't kvm-clock: %+v", log.Lines)
	}
	t.Logf("%d lines of its kernel, complaints: %q", len(log.Kernel), log.Complaints)
	if metadata == "" {
		return
	}
	if len(log.Complaints) > len(booted.Complaints) {
		t.Errorf("its kernel complains: %q", log.Complaints[len(booted.Complaints):])
	}
	neverBack(t, clocks)
}

// neverBack checks that no vCPU of a Linux guest saw time go back, on its own or against another.
func neverBack(t *testing.T, clocks *linuxguest.Clocks) {
	t.Helper()
	for cpu, c := range clocks.CPUs {
		count, largest, err := c.Monotonic.Backsteps()
		if err != nil || count != 0 {
			t.Errorf("vCPU %d: CLOCK_MONOTONIC went back %d times, by up to %d ns: %v", cpu, count, largest, err)
		}
		if count, largest, err = c.Realtime.Backsteps(); err != nil || count != 0 {
			t.Errorf("vCPU %d: CLOCK_REALTIME went back %d times, by up to %d ns: %v", cpu, count, largest, err)
		}
		if count, largest := c.Across(); count != 0 {
			t.Errorf("vCPU %d read CLOCK_MONOTONIC below another's %d times, by up to %d ns", cpu, count, largest)
		}
	}
}
