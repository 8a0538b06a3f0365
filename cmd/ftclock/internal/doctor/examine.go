package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	"ftclock/policy"
)

// Fixes that several findings have.
const (
	seePage    = "share/doc/ftclock/troubleshooting.md explains the messages"
	seeLog     = "the shim's log says more: /var/log/ftclock, or journalctl -t ftclock-shim"
	seeDenials = "run as root; `ausearch -m avc -ts recent` shows what was denied"
)

// Examine checks this host for what ftclock needs, and tries it with a probe domain if it is told to and can.
func Examine(ctx context.Context, at status.Dirs, uri string, probe bool) []Finding {
	x := examined{root: "/", dirs: at}
	kvm := x.checkKVM()
	findings := []Finding{checkRoot(os.Geteuid()), kvm, x.checkKernel(), x.checkClocksource(), x.checkHook()}
	findings = append(findings, x.checkTimer()...)
	findings = append(findings, x.checkSELinux())
	findings = append(findings, checkStateDir(at.Shims)...)
	findings = append(findings, checkForgotten(at)...)
	findings = append(findings, checkPolicy(policy.Dir)...)
	findings = append(findings, checkSynchronised())
	return append(findings, x.checkLibvirt(ctx, uri, os.Geteuid() == 0 && kvm.grade == good && probe)...)
}

// examined is the host that is checked.
type examined struct {
	root string // "/" but in tests
	dirs status.Dirs
}

func (x examined) path(path string) string { return filepath.Join(x.root, path) }

// read gives a small file's text without white space around it.
func (x examined) read(path string) (string, error) {
	text, err := os.ReadFile(x.path(path))
	return strings.TrimSpace(string(text)), err
}

func (x examined) checkKVM() Finding {
	const path = "/dev/kvm"
	f, err := os.OpenFile(x.path(path), os.O_RDWR, 0)
	switch {
	case err == nil:
		_ = f.Close()
		return Finding{good, path + " can be opened", ""}
	case errors.Is(err, os.ErrNotExist):
		return Finding{bad, "there is no " + path,
			"switch virtualization on in the firmware (or in the hypervisor above), then modprobe kvm_intel or kvm_amd"}
	case errors.Is(err, os.ErrPermission) && os.Geteuid() != 0:
		return Finding{warn, path + " can't be opened by this user", "run it as root"}
	}
	return Finding{bad, ui.ErrorText(err), "let root and the group kvm open it: chgrp kvm /dev/kvm; chmod 660 /dev/kvm"}
}

func (x examined) checkKernel() Finding {
	release, err := x.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return Finding{warn, ui.ErrorText(err), "check that /proc is mounted and readable"}
	}
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n == 2 && (major < 5 || major == 5 && minor < 16) {
		return Finding{warn, "Linux " + release + " doesn't tell the TSC at which it reads a guest's clock: anchors are less exact",
			"Linux 5.16 and later do"}
	}
	return Finding{good, "Linux " + release, ""}
}

func (x examined) checkClocksource() Finding {
	const dir = "/sys/devices/system/clocksource/clocksource0/"
	source, err := x.read(dir + "current_clocksource")
	switch {
	case err != nil:
		return Finding{warn, ui.ErrorText(err), "check that /sys is mounted and readable"}
	case source == "tsc", source == "hyperv_clocksource_tsc_page": // KVM's gtod_is_based_on_tsc, arch/x86/kvm/x86.c
		return Finding{good, "clocksource is " + source, ""}
	}
	fix := "the kernel doesn't offer tsc here: `dmesg | grep -i tsc` shows why"
	if available, _ := x.read(dir + "available_clocksource"); slices.Contains(strings.Fields(available), "tsc") {
		fix = "echo tsc > " + dir + "current_clocksource; if the kernel left it by itself, `dmesg | grep -i tsc` shows why"
	}
	return Finding{bad, "clocksource is " + source + ": KVM gives stable guest clocks with the TSC alone, and ftclock leaves others alone",
		fix}
}

// --- libvirt and QEMU ---

// checkLibvirt checks libvirt and QEMU, with probe domains if it is told to.
func (x examined) checkLibvirt(ctx context.Context, uri string, probe bool) []Finding {
	h, err := hypervisor.Connect(uri)
	if err == nil {
		defer h.Close()
		err = h.CheckLocal("doctor")
	}
	if err != nil {
		return []Finding{{bad, ui.ErrorText(err), ui.HintOf(err)}}
	}
	v, err := h.GetLibVersion()
	if err != nil {
		return []Finding{{bad, "asking libvirt for its version: " + ui.ErrorText(err), ""}}
	}
	findings := []Finding{judgeLibvirt(v)}
	v, err = h.GetVersion()
	if err != nil {
		findings = append(findings, Finding{bad, "asking for QEMU's version: " + ui.ErrorText(err), "install qemu-system-x86 or qemu-kvm"})
	} else {
		findings = append(findings, Finding{good, "QEMU " + hypervisor.Dotted(v), ""})
	}
	emulators, err := emulators(h)
	if err != nil {
		findings = append(findings, Finding{bad, ui.ErrorText(err), "libvirt or QEMU needs fixing, not ftclock: `virt-host-validate qemu` checks them"})
	}
	if probe {
		findings = append(findings, prober{x.dirs, h}.probe(ctx, emulators)...)
	}
	return findings
}

func (x examined) checkHook() Finding {
	const fix = "install ftclock's package again"
	if _, err := os.Lstat(x.path(hookLink)); err != nil {
		return Finding{bad, "libvirt's hook isn't there: " + ui.ErrorText(err), fix}
	}
	hook, err := os.Stat(x.path(hookLink))
	switch {
	case err != nil:
		return Finding{bad, "libvirt's hook leads nowhere: " + ui.ErrorText(err), fix}
	case !hook.Mode().IsRegular() || hook.Mode().Perm()&0o111 == 0:
		return Finding{bad, hookLink + " isn't a program that can be run", fix}
	}
	return Finding{good, hookLink + " is there", ""}
}

// checkTimer looks for the link by which systemd starts the timer, where there is a systemd that could.
func (x examined) checkTimer() []Finding {
	const timer = "ftclock-anchor.timer"
	there := func(path string) bool {
		_, err := os.Lstat(x.path(path))
		return err == nil
	}
	if !there(host.SystemdRuns) || !there("/usr/lib/systemd/system/"+timer) && !there("/usr/local/lib/systemd/system/"+timer) {
		return nil
	}
	if there("/etc/systemd/system/timers.target.wants/" + timer) {
		return []Finding{{good, timer + " is enabled: migrations are caught up from what it publishes", ""}}
	}
	return []Finding{{warn, timer + " isn't enabled: migrations, and restores on another host, are held unless somebody else publishes anchors",
		"systemctl enable --now " + timer}}
}

func checkRoot(euid int) Finding {
	if euid == 0 {
		return Finding{good, "running as root", ""}
	}
	return Finding{warn, "not running as root: some checks are incomplete, and no probe domain is started", "sudo ftclock doctor"}
}

// --- the installation ---

// hookLink is how libvirt finds ftclock.
const hookLink = "/etc/libvirt/hooks/qemu.d/50-ftclock"

// --- what is there at run time ---

func checkStateDir(dir string) []Finding {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return []Finding{{good, dir + " isn't there yet: the first shim makes it", ""}}
	case err != nil:
		return []Finding{{warn, ui.ErrorText(err), "check why root can't read it"}}
	case !info.IsDir():
		return []Finding{{bad, dir + " isn't a directory", "remove it: the first shim makes it"}}
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
		return []Finding{{bad, fmt.Sprintf("%s belongs to the user %d", dir, owner.Uid), "chown root:root " + dir}}
	}
	if info.Mode().Perm()&0o022 != 0 {
		return []Finding{{bad, fmt.Sprintf("others than root can write to %s, mode %v", dir, info.Mode()), "chmod 755 " + dir}}
	}
	if err := unix.Access(dir, unix.W_OK); err != nil && os.Geteuid() == 0 {
		return []Finding{{bad, dir + " can't be written to: " + err.Error(), "check whether its file system is mounted read-only"}}
	}
	return append([]Finding{{good, fmt.Sprintf("%s is there, mode %v", dir, info.Mode().Perm()), ""}}, staleShims(dir)...)
}

func staleShims(dir string) []Finding {
	infos, err := control.List(dir)
	var findings []Finding
	if err != nil {
		findings = append(findings, Finding{warn, ui.ErrorText(err), status.NoState})
	}
	for _, info := range infos {
		if _, err := control.Ask(dir, info.UUID, control.Request{Do: "status"}); errors.Is(err, control.ErrGone) {
			findings = append(findings, Finding{warn, fmt.Sprintf("the shim of %s (%s) was killed or crashed", info.Name, info.UUID),
				fmt.Sprintf("`ftclock enable --live %s` if the domain runs, else rm -r %s", ui.ShellWord(info.Name), ui.ShellWord(filepath.Join(dir, info.UUID)))})
		}
	}
	return findings
}

func checkSynchronised() Finding {
	clock, err := host.ReadClock()
	if err != nil {
		return Finding{warn, "asking for the host clock's state: " + err.Error(), "allow adjtimex(2), which a container or a sandbox may forbid"}
	}
	if !clock.Synchronised {
		return Finding{warn, "the host's clock isn't synchronised: policies with reference=\"utc\" follow a clock that is off",
			"run chrony, or another client of NTP or PTP"}
	}
	return Finding{good, fmt.Sprintf("the host's clock is synchronised, to within %s", host.Nanoseconds(uint64(clock.MaximumError))), ""}
}

func judgeLibvirt(v uint32) Finding {
	if v < 6_005_000 {
		return Finding{bad, "libvirt " + hypervisor.Dotted(v) + " runs no hooks from qemu.d", "libvirt 6.5 and later do"}
	}
	return Finding{good, "libvirt " + hypervisor.Dotted(v) + " is reached", ""}
}

// emulators lists libvirt's default QEMU program and those of the managed domains.
func emulators(h *hypervisor.Host) (paths []string, err error) {
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
	listed := h.Each(func(d *hypervisor.Domain) {
		if path := emulator(d); path != "" && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	})
	return paths, errors.Join(err, listed)
}

// emulator is the QEMU program of a managed domain; "" for any other domain.
func emulator(d *hypervisor.Domain) string {
	if f := status.Look(d); !f.Defined && !f.Running {
		return ""
	}
	text, err := d.XML(0)
	if err != nil {
		return ""
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(string(text)); err != nil || x.Devices == nil {
		return ""
	}
	return x.Devices.Emulator
}

// checkForgotten has a finding for each domain that was managed and runs without its metadata.
func checkForgotten(at status.Dirs) []Finding {
	all, err := at.Forgotten()
	if err != nil {
		return []Finding{{bad, "no records are kept: " + ui.ErrorText(err), "check the file system (df, mount); clocks are corrected meanwhile"}}
	}
	slices.SortFunc(all, func(a, b status.Entry) int { return strings.Compare(a.Name, b.Name) })
	var findings []Finding
	for _, e := range all {
		what, fix, _ := strings.Cut(e.Why, "? ")
		findings = append(findings, Finding{bad, e.Name + " runs uncorrected: " + what, fix})
	}
	return findings
}

// checkPolicy has a finding for each file of the host's policy that is wrong.
func checkPolicy(dir string) []Finding {
	const fix = "`ftclock policy check` shows all files, and which domains they name"
	files, err := policy.Read(dir)
	if err != nil {
		return []Finding{{bad, ui.ErrorText(err), fix}}
	}
	var findings []Finding
	for _, f := range files {
		if f.Err != nil {
			findings = append(findings, Finding{bad, "the host's policy: " + ui.ErrorText(f.Err), fix})
		}
	}
	if len(files) > 0 && len(findings) == 0 {
		findings = append(findings, Finding{good, ui.Count(uint64(len(files)), "file") + " of the host's policy can be read", ""})
	}
	return findings
}

// grade is how bad a finding is.
type grade string

const (
	good grade = "ok"
	warn grade = "warn"
	bad  grade = "bad"
)

// Finding is the result of one check.
type Finding struct {
	grade grade
	what  string
	fix   string
}

// Print prints the findings, and returns whether one of them is bad.
func Print(u *ui.UI, findings []Finding) (anyBad bool) {
	colours := map[grade]string{good: ui.Green, warn: ui.Yellow, bad: ui.Red}
	for _, f := range findings {
		u.Printf("%s%s %s\n", u.Paint(colours[f.grade], string(f.grade)), strings.Repeat(" ", 4-len(f.grade)), host.OneLine(f.what))
		if f.fix != "" {
			u.Printf("       %s\n", host.OneLine(f.fix))
		}
		anyBad = anyBad || f.grade == bad
	}
	return anyBad
}
