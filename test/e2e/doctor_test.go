package e2e

import (
	"bytes"
	binary "debug/elf"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/host"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
)

// What the doctor's probe is called, and what it says when all is well.
const (
	probe       = "ftclock-probe"
	probeUUID   = "3d848589-802b-42bb-b249-496b2808830a"
	probeServed = "ok   libvirt calls the hook, and "
	probeHeld   = "ok   its clock held: "
)

// doctor runs the doctor, whose exit code has to be that, and gives what it says.
func doctor(t *testing.T, code int, args ...string) string {
	t.Helper()
	cmd := ftclockCommand(append([]string{"doctor"}, args...)...)
	out, err := cmd.CombinedOutput()
	t.Logf("doctor:\n%s", out)
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		t.Errorf("got %v, want exit code %d", err, code)
	}
	return string(out)
}

func wantLine(t *testing.T, out, start, part string) {
	t.Helper()
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, start) && strings.Contains(line, part) {
			return
		}
	}
	t.Errorf("no line begins with %q and has %q", start, part)
}

// probeLeft lists what there still is of a probe.
func probeLeft() (left []string) {
	for _, pattern := range []string{
		"/var/lib/ftclock/" + probeUUID + "*", control.Dir + "/" + probeUUID + "*", host.LogDir + "/" + probe + "*",
		"/var/log/libvirt/qemu/" + probe + "*", "/run/libvirt/qemu/" + probe + "*", "/var/lib/libvirt/qemu/domain-*" + probe + "*",
	} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	return left
}

func noProbeLeft(t *testing.T) {
	t.Helper()
	if left := probeLeft(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if out, err := virsh("domstate", probe); err == nil {
		t.Errorf("the probe is there: %s", out)
	}
}

// The doctor proves what it says by a domain of its own, on every QEMU program of a managed domain, and leaves nothing of it. A
// domain that runs beside it doesn't notice.
func TestKVMDoctorProvesByDoing(t *testing.T) {
	odd := oddQEMU(t)
	x := managed("odd", clockElement)
	x.Devices.Emulator = odd
	d, clock := start(t, managed("beside", clockElement))
	before, pauses := offset(t, clock), status(t, d).Pauses

	out := doctor(t, 0)
	wantLine(t, out, probeServed, "qemu-system-x86_64 takes the module")
	wantLine(t, out, probeHeld, " off after 2 pauses of ")
	noProbeLeft(t)
	if s := status(t, d); s.Pauses != pauses || s.State != control.Correcting {
		t.Errorf("the domain beside it: %+v", withoutRecords(s))
	}
	check.Within(t, offset(t, clock)-before, maxDrift, "the clock of the domain beside it moved")
	if out := doctor(t, 0, "--no-probe"); strings.Contains(out, "probe") {
		t.Error("--no-probe has a probe")
	}

	t.Run("a QEMU that can't take the module", func(t *testing.T) {
		domaintest.Define(t, conn, x)
		out := doctor(t, 1)
		wantLine(t, out, probeServed, "/usr/bin/qemu-system-x86_64 takes the module")
		wantLine(t, out, "bad  a probe domain on "+odd+" can't be served: ", "doesn't begin like one for glibc")
		noProbeLeft(t)
	})
	t.Run("no module", func(t *testing.T) {
		replaced(t, installedModule, "", 0)
		wantLine(t, doctor(t, 1), "bad  a probe domain on ", "finding libftclock-qemu.so: not at")
		noProbeLeft(t)
	})
}

// oddQEMU is the machine's QEMU with one byte changed: its first instruction is another one that does the same, so that it doesn't
// begin like a program for glibc, as one for musl doesn't.
func oddQEMU(t *testing.T) string {
	t.Helper()
	path := check.Value(exec.LookPath("qemu-system-x86_64"))(t)
	image := check.Value(os.ReadFile(path))(t)
	f := check.Value(binary.NewFile(bytes.NewReader(image)))(t)
	const xor, same = "\x31\xed", "\x33\xed" // xor %ebp, %ebp
	for _, p := range f.Progs {
		if p.Type != binary.PT_LOAD || f.Entry < p.Vaddr || f.Entry >= p.Vaddr+p.Filesz {
			continue
		}
		start := image[f.Entry-p.Vaddr+p.Off:][:16]
		if at := bytes.Index(start, []byte(xor)); at >= 0 {
			copy(start[at:], same)
			// It looks for its parts beside its own directory.
			dir := filepath.Join(privatelibvirt.Dir, "odd")
			odd := filepath.Join(dir, "bin/qemu-system-x86_64")
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			err := errors.Join(os.MkdirAll(filepath.Dir(odd), 0o755), os.WriteFile(odd, image, 0o755),
				os.Symlink("/usr/lib", filepath.Join(dir, "lib")), os.Symlink("/usr/share", filepath.Join(dir, "share")))
			if err != nil {
				t.Fatal(err)
			}
			return odd
		}
	}
	t.Fatalf("%s doesn't begin as expected", path)
	return ""
}

// A hook that is there, and that libvirt doesn't call, is found: here libvirt has looked for hooks when there were none.
func TestKVMDoctorFindsAHookThatIsNotCalled(t *testing.T) {
	restart := func(meanwhile func() error) {
		t.Helper()
		check.NoError(t, errors.Join(privatelibvirt.Stop(), meanwhile(), privatelibvirt.Start()))
		fresh := check.Value(privatelibvirt.Connect())(t)
		_, _ = conn.Close()
		conn = fresh
	}
	aside := privatelibvirt.HooksDir + ".aside"
	restart(func() error { return os.Rename(privatelibvirt.HooksDir, aside) })
	check.NoError(t, os.Rename(aside, privatelibvirt.HooksDir))
	out := doctor(t, 1)
	wantLine(t, out, "ok   /etc/libvirt/hooks/qemu.d/50-ftclock is there", "")
	wantLine(t, out, "bad  libvirt doesn't call the hook: ", "")
	noProbeLeft(t)
	restart(func() error { return nil })
	wantLine(t, doctor(t, 0), probeServed, "")
}

// However the doctor ends, the probe goes; what is left of one that was killed goes with the next.
func TestKVMDoctorInterrupted(t *testing.T) {
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			cmd := ftclockCommand("doctor")
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			check.NoError(t, cmd.Start())
			check.Await(t, 2*time.Minute, 10*time.Millisecond, func() bool { return len(probeLeft()) > 0 }, "no probe came")
			if out := doctor(t, 0); !strings.Contains(out, "warn no probe domain was tried: ") {
				t.Error("a second doctor doesn't keep away")
			}
			_ = cmd.Process.Signal(signal)
			err := cmd.Wait()
			t.Logf("%v\n%s", err, &out)
			if signal == unix.SIGINT && (cmd.ProcessState.ExitCode() != 3 || !strings.Contains(out.String(), "interrupted")) {
				t.Error("it doesn't say that it was interrupted")
			}
			for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
				if _, err := virsh("domstate", probe); err != nil || signal == unix.SIGINT {
					break
				} else if time.Now().After(end) {
					t.Fatal("the probe outlives its doctor")
				}
			}
			if signal == unix.SIGKILL {
				nothingLeft(t)
				doctor(t, 0)
			}
			noProbeLeft(t)
		})
	}
}

// Where the host's clocksource isn't the TSC, KVM gives guests no stable clock. The probe sees it.
func TestKVMDoctorWithAnotherClocksource(t *testing.T) {
	choose := hostClocksource(t)
	choose("acpi_pm")
	out := doctor(t, 1)
	wantLine(t, out, "bad  clocksource is acpi_pm", "")
	wantLine(t, out, "bad  a probe domain's clock doesn't hold: ", "")
	noProbeLeft(t)
}
