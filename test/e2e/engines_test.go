package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"
)

// An engine may halt the guest without QEMU's knowing. Its clock was never frozen then: nothing may be added, and a real
// checkpoint afterwards, or around it, is caught up once.
func TestKVMAnEngineThatFreezesNoClock(t *testing.T) {
	d, clock := start(t, managed("frozen", clockElement))
	pid := domaintest.PID(t, d)
	pause(t, d, 5*time.Millisecond) // takes the anchor
	process := func(t *testing.T) {
		t.Helper()
		check.NoError(t, unix.Kill(pid, unix.SIGSTOP))
		time.Sleep(20 * time.Millisecond)
		check.NoError(t, unix.Kill(pid, unix.SIGCONT))
	}
	for _, c := range []struct {
		name   string
		pauses uint64 // that QEMU makes itself, each time
		halt   func(t *testing.T)
	}{
		{"the process", 0, process},
		{"the vCPU's thread", 0, func(t *testing.T) { haltVCPU(t, pid, 20*time.Millisecond) }},
		{"the process in a checkpoint", 1, func(t *testing.T) {
			check.NoError(t, d.Suspend())
			process(t)
			check.NoError(t, d.Resume())
		}},
	} {
		for _, r := range []rule{rules[0], rules[3]} {
			t.Run(c.name+", "+r.name, func(t *testing.T) {
				setPolicy(t, d, r.clock)
				const times = 20
				before, s0 := offset(t, clock), status(t, d)
				for range times {
					c.halt(t)
				}
				s := status(t, d)
				if s.Pauses != s0.Pauses+times*c.pauses {
					t.Errorf("%d pauses were seen, want %d", s.Pauses-s0.Pauses, times*c.pauses)
				}
				lostAsRecorded(t, clock, before, nil)
				pauses(t, d, 5, 5*time.Millisecond)
				lostAsRecorded(t, clock, before, nil)
				if s := status(t, d); s.Held != 0 || s.Passed != 1 || s.Reanchored != 0 || s.Anchor.Epoch != s0.Anchor.Epoch || s.Disagreements != 0 {
					t.Errorf("status: %+v", withoutRecords(s))
				}
				domaintest.NoBacksteps(t, clock)
			})
		}
	}
}

// haltVCPU stops the thread of QEMU's first vCPU for that long.
func haltVCPU(t *testing.T, qemu int, length time.Duration) {
	t.Helper()
	tasks := check.Value(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", qemu)))(t)
	vcpu := 0
	for _, task := range tasks {
		if name, _ := os.ReadFile(task); strings.TrimSpace(string(name)) == "CPU 0/KVM" {
			vcpu, _ = strconv.Atoi(strings.Split(task, "/")[4])
		}
	}
	if vcpu == 0 {
		t.Fatalf("QEMU %d has no thread of a vCPU", qemu)
	}
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(vcpu); err != nil {
		t.Fatal(os.NewSyscallError("ptrace", err))
	}
	if err := unix.PtraceInterrupt(vcpu); err != nil {
		t.Fatal(os.NewSyscallError("ptrace", err))
	}
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(vcpu, &status, unix.WALL, nil); err != nil {
			t.Fatal(os.NewSyscallError("wait4", err))
		}
		if status>>16 == unix.PTRACE_EVENT_STOP {
			break
		}
		// A signal of QEMU's own came first: it may have it.
		if err := unix.PtraceCont(vcpu, int(status.StopSignal())); err != nil {
			t.Fatal(os.NewSyscallError("ptrace", err))
		}
	}
	time.Sleep(length)
	if err := unix.PtraceDetach(vcpu); err != nil {
		t.Fatal(os.NewSyscallError("ptrace", err))
	}
}

// A QEMU that makes up for downtime itself, by having the kernel add to the clock, must not make it count twice. The
// stand-in is described where it is, in testdata/downtime.c.
func TestKVMAQEMUThatAccountsForDowntime(t *testing.T) {
	library := check.Value(built.Copy(built.Downtime, privatelibvirt.Dir))(t)
	disk := domaintest.Disk(t, domaintest.File(t, "downtime", "disk"))
	domain := func(name string) *libvirtxml.Domain {
		x := managed(name, clockElement)
		privatelibvirt.SetEnvironment(x, [2]string{"LD_PRELOAD", library})
		x.Devices.Disks = []libvirtxml.DomainDisk{privatelibvirt.QCOW2(disk)}
		return x
	}
	const times, length = 20, 20 * time.Millisecond

	t.Run("stock", func(t *testing.T) {
		x := domain("downtime-stock")
		x.Metadata = nil
		d, clock := start(t, x)
		before := offset(t, clock)
		pauses(t, d, times, length)
		if lost := offset(t, clock) - before; lost > times*int64(length)/10 || lost < -times*int64(length)/10 {
			t.Fatalf("the guest lost %d ns: the stand-in doesn't do what it is for", lost)
		}
	})
	t.Run("ftclock", func(t *testing.T) {
		d, clock := start(t, domain("downtime"))
		pause(t, d, 5*time.Millisecond) // takes the anchor

		t.Run("caught up", func(t *testing.T) {
			before := offset(t, clock)
			pauses(t, d, times, length)
			lostAsRecorded(t, clock, before, nil)
			if s := status(t, d); s.Dropped+s.Anchored != times+1 || s.Held != 0 || s.Disagreements != 0 || len(s.Warnings) != 0 {
				t.Errorf("status: %+v", withoutRecords(s))
			}
		})
		// What is held is QEMU's, and this one adds. The anchor is given up: only the kernel knows how much that was.
		t.Run("held", func(t *testing.T) {
			setPolicy(t, d, rules[1].clock)
			before, s0 := offset(t, clock), status(t, d)
			pause(t, d, rulePause)
			setPolicy(t, d, clockElement)
			pause(t, d, 5*time.Millisecond)
			s := status(t, d)
			if lost := offset(t, clock) - before; lost > int64(rulePause)/10 || lost < -int64(rulePause)/10 {
				t.Errorf("the guest lost %d ns of a pause that QEMU accounts for", lost)
			}
			if r := s.Records[len(s.Records)-2]; r.Decision != clockpage.Held || s.Anchor.Epoch != s0.Anchor.Epoch+1 || s.Anchor.Valid != 1 {
				t.Errorf("record: %+v\nstatus: %+v", r, withoutRecords(s))
			}
			before = offset(t, clock)
			pauses(t, d, times, length)
			lostAsRecorded(t, clock, before, nil)
		})
		// Here the module writes the clock itself.
		t.Run("restored", func(t *testing.T) {
			setPolicy(t, d, clockWith(`<ftclock:on event="restore" do="catch-up"/>`))
			before := offset(t, clock)
			human(t, d, "savevm one")
			time.Sleep(rulePause)
			human(t, d, "loadvm one")
			pause(t, d, 5*time.Millisecond)
			s := status(t, d)
			lostAsRecorded(t, clock, before, nil)
			if r := s.Records[len(s.Records)-2]; r.Reason != clockpage.FromAnchor {
				t.Errorf("record: %+v", r)
			}
		})
		domaintest.NoBacksteps(t, clock)
	})
}
