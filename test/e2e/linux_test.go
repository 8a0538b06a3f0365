package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"ftclock/test/guest"
	"ftclock/test/linuxguest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

// linuxOffsets are how far a Linux guest's CLOCK_MONOTONIC and CLOCK_REALTIME are behind CLOCK_MONOTONIC_RAW, in ns.
func linuxOffsets(t *testing.T, clocks *linuxguest.Clocks) (o [2]int64) {
	t.Helper()
	for i, c := range []*guest.Clock{clocks.Monotonic, clocks.Realtime} {
		o[i] = offset(t, c)
	}
	return o
}

// A real Linux guest on kvm-clock loses the pauses with stock QEMU, and keeps its clocks with ftclock. Its system calls
// run under emulation on machines without hardware virtualization: what it reads is noisier than the freestanding guest's.
func TestKVMLinuxGuest(t *testing.T) {
	const noise = int64(100 * time.Microsecond)
	if missing := linuxguest.Missing(); len(missing) > 0 {
		if os.Getenv("FTCLOCK_TEST_KERNEL") == "" {
			t.Skip("LEFT OUT: " + strings.Join(missing, "; "))
		}
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	image, err := linuxguest.Build(privatelibvirt.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, metadata string
		pauses         int
	}{
		{"stock", "", 20},
		{"ftclock", clockElement, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := linuxguest.XML("linux-"+c.name, image)
			if c.metadata != "" {
				x.Metadata = &libvirtxml.DomainMetadata{XML: c.metadata}
			}
			d := define(t, x)
			if err := d.Create(); err != nil {
				t.Fatal(err)
			}
			pid, err := d.PID()
			if err != nil {
				t.Fatal(err)
			}
			clocks, err := linuxguest.Open(pid, 15*time.Minute)
			if err != nil {
				console, _ := os.ReadFile(linuxguest.Console(d.Name))
				t.Fatalf("%v\n%s", err, console)
			}
			defer clocks.Close()

			before := linuxOffsets(t, clocks)
			for range c.pauses {
				pause(t, d, 20*time.Millisecond)
			}
			after := linuxOffsets(t, clocks)
			paused := int64(c.pauses) * int64(20*time.Millisecond)
			for i, name := range []string{"CLOCK_MONOTONIC", "CLOCK_REALTIME"} {
				lost := after[i] - before[i]
				t.Logf("%s lost %d ns of %d ns paused", name, lost, paused)
				if c.metadata == "" && lost < paused*9/10 {
					t.Errorf("%s lost only %d ns of %d: the measuring doesn't work, or something corrects the clock", name, lost, paused)
				}
				if c.metadata != "" && (lost > noise || lost < -noise) {
					t.Errorf("%s lost %d ns", name, lost)
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
			if c.metadata == "" {
				return
			}
			if len(log.Complaints) > 0 {
				t.Errorf("its kernel complains: %q", log.Complaints)
			}
			for i, c := range []*guest.Clock{clocks.Monotonic, clocks.Realtime} {
				if count, largest, err := c.Backsteps(); err != nil || count != 0 {
					t.Errorf("clock %d went back %d times, by up to %d ns: %v", i, count, largest, err)
				}
			}
		})
	}
}
