package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"ftclock/control"
	machine "ftclock/host"
)

type doctorCmd struct {
	NoProbe bool `help:"Only look: start no domain."`
}

func (doctorCmd) Help() string {
	return "A line for each thing that ftclock needs: ok, warn (something doesn't work, or not as well) or bad (ftclock " +
		"doesn't work), with what fixes it below. Exit code 1 says that something is bad. " +
		"As root on a host with KVM it proves the rest by doing: on each QEMU program that managed domains use, a domain named " + probeName + ", without disk " +
		"and network, goes through libvirt, hook, shim and module, is paused three times, and is removed with all that it leaves."
}

// grade is how a finding is.
type grade string

const (
	good grade = "ok"
	warn grade = "warn"
	bad  grade = "bad"
)

// finding is a line of the doctor's.
type finding struct {
	grade grade
	what  string
	fix   string
}

// examined is the host under the doctor's eyes.
type examined struct {
	root string // "/" but in tests
}

func (x examined) path(path string) string { return filepath.Join(x.root, path) }

// read gives a small file's text without white space around it.
func (x examined) read(path string) (string, error) {
	text, err := os.ReadFile(x.path(path))
	return strings.TrimSpace(string(text)), err
}

func (c *doctorCmd) Run(p *program) error {
	x := examined{root: "/"}
	kvm := x.checkKVM()
	findings := []finding{checkRoot(os.Geteuid()), kvm, x.checkKernel(), x.checkClocksource(), x.checkHook()}
	findings = append(findings, x.checkTimer()...)
	findings = append(findings, x.checkSELinux())
	findings = append(findings, checkStateDir(shims)...)
	findings = append(findings, checkForgotten()...)
	findings = append(findings, checkSynchronised())
	findings = append(findings, checkLibvirt(p, os.Geteuid() == 0 && kvm.grade == good && !c.NoProbe)...)
	if anyBad := printFindings(p.ui, findings); p.ctx.Err() != nil {
		return errors.New("interrupted; no probe domain is left")
	} else if anyBad {
		return errProblem
	}
	return nil
}

// printFindings tells whether one of them is bad.
func printFindings(u *ui, findings []finding) (anyBad bool) {
	colours := map[grade]string{good: green, warn: yellow, bad: red}
	for _, f := range findings {
		u.printf("%s%s %s\n", u.paint(colours[f.grade], string(f.grade)), strings.Repeat(" ", 4-len(f.grade)), oneLine(f.what))
		if f.fix != "" {
			u.printf("       %s\n", oneLine(f.fix))
		}
		anyBad = anyBad || f.grade == bad
	}
	return anyBad
}

func checkRoot(euid int) finding {
	if euid == 0 {
		return finding{good, "running as root", ""}
	}
	return finding{warn, "not running as root: some of what follows can't be seen, and nothing is proven by a probe domain", "sudo ftclock doctor"}
}

func (x examined) checkKVM() finding {
	const path = "/dev/kvm"
	f, err := os.OpenFile(x.path(path), os.O_RDWR, 0)
	switch {
	case err == nil:
		_ = f.Close()
		return finding{good, path + " can be opened", ""}
	case errors.Is(err, os.ErrNotExist):
		return finding{bad, "there is no " + path,
			"switch virtualization on in the firmware (or in the hypervisor above), then modprobe kvm_intel or kvm_amd"}
	case errors.Is(err, os.ErrPermission) && os.Geteuid() != 0:
		return finding{warn, path + " can't be opened by this user", "look again as root"}
	}
	return finding{bad, sayError(err), "let root and the group kvm open it: chgrp kvm /dev/kvm; chmod 660 /dev/kvm"}
}

func (x examined) checkKernel() finding {
	release, err := x.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return finding{warn, sayError(err), "see that /proc is mounted and may be read"}
	}
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n == 2 && (major < 5 || major == 5 && minor < 16) {
		return finding{warn, "Linux " + release + " doesn't tell the TSC at which it reads a guest's clock: anchors are less exact",
			"Linux 5.16 and later do"}
	}
	return finding{good, "Linux " + release, ""}
}

func (x examined) checkClocksource() finding {
	const dir = "/sys/devices/system/clocksource/clocksource0/"
	source, err := x.read(dir + "current_clocksource")
	switch {
	case err != nil:
		return finding{warn, sayError(err), "see that /sys is mounted and may be read"}
	case source == "tsc", source == "hyperv_clocksource_tsc_page": // KVM's gtod_is_based_on_tsc, arch/x86/kvm/x86.c
		return finding{good, "clocksource is " + source, ""}
	}
	fix := "the kernel doesn't offer tsc here: `dmesg | grep -i tsc` tells why"
	if available, _ := x.read(dir + "available_clocksource"); slices.Contains(strings.Fields(available), "tsc") {
		fix = "echo tsc > " + dir + "current_clocksource; if the kernel left it by itself, `dmesg | grep -i tsc` tells why"
	}
	return finding{bad, "clocksource is " + source + ": KVM gives stable guest clocks with the TSC alone, and ftclock leaves others alone",
		fix}
}

// --- libvirt and QEMU ---

// checkLibvirt looks at libvirt, and proves by a probe where that is wanted.
func checkLibvirt(p *program, probe bool) []finding {
	h, err := connect(p.uri)
	if err == nil {
		defer h.close()
		err = checkLocal(h, "doctor")
	}
	if err != nil {
		f := finding{bad, sayError(err), ""}
		var with *hintedError
		if errors.As(err, &with) {
			f.fix = with.hint
		}
		return []finding{f}
	}
	v, err := h.GetLibVersion()
	if err != nil {
		return []finding{{bad, "asking libvirt for its version: " + sayError(err), ""}}
	}
	findings := []finding{judgeLibvirt(v)}
	v, err = h.GetVersion()
	if err != nil {
		findings = append(findings, finding{bad, "asking for QEMU's version: " + sayError(err), "install qemu-system-x86 or qemu-kvm"})
	} else {
		findings = append(findings, finding{good, "QEMU " + dotted(v), ""})
	}
	emulators, err := emulators(h)
	if err != nil {
		findings = append(findings, finding{bad, sayError(err), "`virt-host-validate qemu` looks further: it isn't ftclock's"})
	}
	if probe {
		findings = append(findings, h.probe(p.ctx, emulators)...)
	}
	return findings
}

func judgeLibvirt(v uint32) finding {
	if v < 6_005_000 {
		return finding{bad, "libvirt " + dotted(v) + " runs no hooks from qemu.d", "libvirt 6.5 and later do"}
	}
	return finding{good, "libvirt " + dotted(v) + " is reached", ""}
}

// emulators lists the QEMU program that libvirt takes by itself, and those of the domains that are ours.
func emulators(h *host) (paths []string, err error) {
	var caps libvirtxml.DomainCaps
	text, err := h.GetDomainCapabilities("", "x86_64", "", "kvm", 0)
	if err == nil {
		err = caps.Unmarshal(text)
	}
	if err != nil {
		err = fmt.Errorf("asking libvirt for its QEMU with KVM: %w", err)
	} else {
		paths = []string{caps.Path}
	}
	all, listed := h.ListAllDomains(0)
	if listed != nil {
		return paths, errors.Join(err, fmt.Errorf("listing domains: %w", listed))
	}
	for i := range all {
		if d, err := h.describe(&all[i]); err == nil {
			if path := d.emulator(); path != "" && !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
			d.free()
		}
	}
	return paths, err
}

// emulator is the program of a domain of ours, "" of any other.
func (d *domain) emulator() string {
	if f := look(d); !f.defined && !f.running {
		return ""
	}
	text, err := d.xml(0)
	if err != nil {
		return ""
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(string(text)); err != nil || x.Devices == nil {
		return ""
	}
	return x.Devices.Emulator
}

// --- the installation ---

// hookLink is how libvirt finds ftclock.
const hookLink = "/etc/libvirt/hooks/qemu.d/50-ftclock"

func (x examined) checkHook() finding {
	const fix = "install ftclock's package again"
	if _, err := os.Lstat(x.path(hookLink)); err != nil {
		return finding{bad, "libvirt's hook isn't there: " + sayError(err), fix}
	}
	hook, err := os.Stat(x.path(hookLink))
	switch {
	case err != nil:
		return finding{bad, "libvirt's hook leads nowhere: " + sayError(err), fix}
	case !hook.Mode().IsRegular() || hook.Mode().Perm()&0o111 == 0:
		return finding{bad, hookLink + " isn't a program that can be run", fix}
	}
	return finding{good, hookLink + " is there", ""}
}

// checkTimer looks for the link by which systemd starts the timer, where there is a systemd that could.
func (x examined) checkTimer() []finding {
	const timer = "ftclock-anchor.timer"
	there := func(path string) bool {
		_, err := os.Lstat(x.path(path))
		return err == nil
	}
	if !there(machine.SystemdRuns) || !there("/usr/lib/systemd/system/"+timer) && !there("/usr/local/lib/systemd/system/"+timer) {
		return nil
	}
	if there("/etc/systemd/system/timers.target.wants/" + timer) {
		return []finding{{good, timer + " is enabled: migrations are caught up from what it publishes", ""}}
	}
	return []finding{{warn, timer + " isn't enabled: migrations, and restores on another host, are held unless somebody else publishes anchors",
		"systemctl enable --now " + timer}}
}

// --- what is there at run time ---

func checkStateDir(dir string) []finding {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return []finding{{good, dir + " isn't there yet: the first shim makes it", ""}}
	case err != nil:
		return []finding{{warn, sayError(err), "see that it can be looked into by root"}}
	case !info.IsDir():
		return []finding{{bad, dir + " isn't a directory", "remove it: the first shim makes it"}}
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
		return []finding{{bad, fmt.Sprintf("%s belongs to the user %d", dir, owner.Uid), "chown root:root " + dir}}
	}
	if info.Mode().Perm()&0o022 != 0 {
		return []finding{{bad, fmt.Sprintf("others than root can write to %s, mode %v", dir, info.Mode()), "chmod 755 " + dir}}
	}
	if err := unix.Access(dir, unix.W_OK); err != nil && os.Geteuid() == 0 {
		return []finding{{bad, dir + " can't be written to: " + err.Error(), "is it on a file system that is read-only?"}}
	}
	return append([]finding{{good, fmt.Sprintf("%s is there, mode %v", dir, info.Mode().Perm()), ""}}, staleShims(dir)...)
}

func staleShims(dir string) []finding {
	infos, err := control.List(dir)
	var findings []finding
	if err != nil {
		findings = append(findings, finding{warn, sayError(err), noState})
	}
	for _, info := range infos {
		if _, err := control.Ask(dir, info.UUID, control.Request{Do: "status"}); errors.Is(err, control.ErrGone) {
			findings = append(findings, finding{warn, fmt.Sprintf("the shim of %s (%s) was killed or crashed", info.Name, info.UUID),
				fmt.Sprintf("`ftclock enable --live %s` if the domain runs, else rm -r %s", shellWord(info.Name), shellWord(filepath.Join(dir, info.UUID)))})
		}
	}
	return findings
}

func checkSynchronised() finding {
	clock, err := machine.ReadClock()
	if err != nil {
		return finding{warn, "asking for the host clock's state: " + err.Error(), "allow adjtimex(2), which a container or a sandbox may forbid"}
	}
	if !clock.Synchronised {
		return finding{warn, "the host's clock isn't synchronised: policies with reference=\"utc\" follow a clock that is off",
			"run chrony, or another client of NTP or PTP"}
	}
	return finding{good, fmt.Sprintf("the host's clock is synchronised, to within %s", sayNS(uint64(clock.MaximumError))), ""}
}
