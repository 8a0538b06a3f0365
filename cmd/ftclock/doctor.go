package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"ftclock/control"
	"ftclock/spawn"
)

type doctorCmd struct{}

func (doctorCmd) Help() string {
	return "A line for each thing that ftclock needs: ok, warn (something doesn't work, or not as well) or bad (ftclock " +
		"doesn't work), with what mends it below. Exit code 1 says that something is bad."
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
	mend  string
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

func (doctorCmd) Run(p *program) error {
	x := examined{root: "/"}
	findings := []finding{checkRoot(os.Geteuid()), x.checkKVM(), x.checkKernel(), x.checkClocksource()}
	findings = append(findings, x.checkLibvirt(p.uri)...)
	findings = append(findings, x.checkHook()...)
	findings = append(findings, checkInstalled()...)
	findings = append(findings, x.checkTimer()...)
	findings = append(findings, x.checkPtrace(), x.checkAppArmor(), x.checkSELinux())
	findings = append(findings, checkStateDir(shims)...)
	findings = append(findings, checkForgotten()...)
	findings = append(findings, checkSynchronised())
	if printFindings(p.ui, findings) {
		return errProblem
	}
	return nil
}

// printFindings tells whether one of them is bad.
func printFindings(u *ui, findings []finding) (anyBad bool) {
	colours := map[grade]string{good: green, warn: yellow, bad: red}
	for _, f := range findings {
		u.printf("%s%s %s\n", u.paint(colours[f.grade], string(f.grade)), strings.Repeat(" ", 4-len(f.grade)), oneLine(f.what))
		if f.mend != "" {
			u.printf("       %s\n", oneLine(f.mend))
		}
		anyBad = anyBad || f.grade == bad
	}
	return anyBad
}

func checkRoot(euid int) finding {
	if euid == 0 {
		return finding{good, "running as root", ""}
	}
	return finding{warn, "not running as root: some of what follows can't be seen", "sudo ftclock doctor"}
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
	case source == "tsc":
		return finding{good, "clocksource is tsc", ""}
	}
	mend := "the kernel doesn't offer tsc here: `dmesg | grep -i tsc` tells why"
	if available, _ := x.read(dir + "available_clocksource"); slices.Contains(strings.Fields(available), "tsc") {
		mend = "echo tsc > " + dir + "current_clocksource; if the kernel left it by itself, `dmesg | grep -i tsc` tells why"
	}
	return finding{bad, "clocksource is " + source + ": KVM gives stable guest clocks with tsc alone, and ftclock leaves others alone",
		mend}
}

// --- libvirt and QEMU ---

func (x examined) checkLibvirt(uri string) []finding {
	h, err := connect(uri)
	if err == nil {
		defer h.close()
		err = checkLocal(h, "doctor")
	}
	if err != nil {
		f := finding{bad, sayError(err), ""}
		var with *hintedError
		if errors.As(err, &with) {
			f.mend = with.hint
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
		findings = append(findings, finding{warn, sayError(err), "`virsh capabilities` should tell which QEMU there is"})
	}
	for _, path := range emulators {
		findings = append(findings, checkEmulator(path))
	}
	return findings
}

func judgeLibvirt(v uint32) finding {
	if v < 6_005_000 {
		return finding{bad, "libvirt " + dotted(v) + " runs no hooks from qemu.d", "libvirt 6.5 and later do"}
	}
	return finding{good, "libvirt " + dotted(v) + " is reached", ""}
}

// emulators lists the QEMU programs that libvirt would take, and those of the domains that are ours.
func emulators(h *host) ([]string, error) {
	var paths []string
	var first error
	for _, kind := range []string{"kvm", "qemu"} {
		text, err := h.GetDomainCapabilities("", "x86_64", "", kind, 0)
		if err != nil {
			first = errors.Join(first, fmt.Errorf("asking libvirt for its emulator: %w", err))
			continue
		}
		var caps libvirtxml.DomainCaps
		if err := caps.Unmarshal(text); err != nil {
			return nil, fmt.Errorf("reading libvirt's capabilities: %w", err)
		}
		paths, first = append(paths, caps.Path), nil
		break
	}
	all, err := h.ListAllDomains(0)
	if err != nil {
		return paths, fmt.Errorf("listing domains: %w", err)
	}
	for i := range all {
		if d, err := h.describe(&all[i]); err == nil {
			if path := d.emulator(); path != "" && !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
			d.free()
		}
	}
	return paths, first
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

func checkEmulator(path string) finding {
	slots, bindNow, err := ioctlSlots(path)
	switch {
	case err != nil:
		return finding{bad, "emulator " + path + ": " + sayError(err), "ftclock needs QEMU itself there, as a program for x86-64 that is linked dynamically"}
	case slots == 0:
		return finding{bad, "emulator " + path + " doesn't call ioctl through a slot: there is no place for the module",
			"use the distribution's own QEMU, linked dynamically"}
	case !bindNow:
		return finding{bad, "emulator " + path + " binds its slots late: the dynamic linker would take the module's place back",
			"use the distribution's own QEMU, or link this one with -z now"}
	}
	return finding{good, "emulator " + path + " has a slot for ioctl, bound at the start", ""}
}

// --- the installation ---

// hookLink is how libvirt finds ftclock.
const hookLink = "/etc/libvirt/hooks/qemu.d/50-ftclock"

func (x examined) checkHook() []finding {
	const mend = "install ftclock's package again"
	link, err := os.Lstat(x.path(hookLink))
	if err != nil {
		return []finding{{bad, "libvirt's hook isn't there: " + sayError(err), mend}}
	}
	hook, err := os.Stat(x.path(hookLink))
	switch {
	case err != nil:
		return []finding{{bad, "libvirt's hook leads nowhere: " + sayError(err), mend}}
	case !hook.Mode().IsRegular() || hook.Mode().Perm()&0o111 == 0:
		return []finding{{bad, hookLink + " isn't a program that can be run", mend}}
	}
	findings := []finding{{good, hookLink + " is there", ""}}
	if changed, ok := link.Sys().(*syscall.Stat_t); ok {
		since := time.Unix(changed.Ctim.Unix())
		for _, d := range x.daemons() {
			if d.started.Before(since.Truncate(time.Second)) {
				findings = append(findings, finding{warn,
					fmt.Sprintf("%s (pid %d) is older than the hook, and may have looked for hooks at its start alone", d.name, d.pid),
					"systemctl restart " + d.name + " (domains keep running)"})
			}
		}
	}
	return findings
}

// daemon is a running daemon of libvirt's that starts QEMUs.
type daemon struct {
	name    string
	pid     int
	started time.Time
}

// daemons finds them in /proc. What can't be read is left out.
func (x examined) daemons() []daemon {
	boot := x.bootTime()
	entries, _ := os.ReadDir(x.path("/proc"))
	var found []daemon
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || boot.IsZero() {
			continue
		}
		comm, _ := x.read("/proc/" + entry.Name() + "/comm")
		if comm != "libvirtd" && comm != "virtqemud" {
			continue
		}
		stat, err := x.read("/proc/" + entry.Name() + "/stat")
		if err != nil {
			continue
		}
		if ticks, ok := startTicks(stat); ok {
			found = append(found, daemon{comm, pid, boot.Add(time.Duration(ticks) * time.Second / userHZ)})
		}
	}
	return found
}

// userHZ is the kernel's unit of time in /proc, the same on every x86 (proc(5), sysconf(_SC_CLK_TCK)).
const userHZ = 100

// startTicks is field 22 of /proc/PID/stat: the start in ticks since boot. The name in field 2 may hold anything.
func startTicks(stat string) (uint64, bool) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, false
	}
	ticks, err := strconv.ParseUint(fields[19], 10, 64)
	return ticks, err == nil && ticks < 1<<40
}

func (x examined) bootTime() time.Time {
	stat, _ := x.read("/proc/stat")
	for line := range strings.Lines(stat) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			if seconds, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64); err == nil {
				return time.Unix(seconds, 0)
			}
		}
	}
	return time.Time{}
}

func checkInstalled() []finding {
	module, err := spawn.ModulePath()
	findings := []finding{checkFile("module", module, err, 0o444)}
	shim, err := spawn.ShimPath()
	return append(findings, checkFile("shim", shim, err, 0o555))
}

// checkFile looks whether everybody has these permissions, on the way there as well: QEMU runs as a user of its own.
func checkFile(what, path string, err error, want os.FileMode) finding {
	const mend = "install ftclock's package again"
	var info os.FileInfo
	if err == nil {
		info, err = os.Stat(path)
	}
	switch {
	case err != nil:
		return finding{bad, what + ": " + sayError(err), mend}
	case !info.Mode().IsRegular() || info.Mode().Perm()&want != want:
		return finding{bad, fmt.Sprintf("%s %s has the mode %v", what, path, info.Mode()), fmt.Sprintf("chmod a+%s %s", modeLetters(want), path)}
	}
	for dir := filepath.Dir(path); dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			return finding{bad, fmt.Sprintf("%s %s is out of the reach of QEMU's user: %s has the mode %v", what, path, dir, info.Mode()),
				"chmod a+x " + dir}
		}
	}
	return finding{good, what + " " + path, ""}
}

func modeLetters(want os.FileMode) string {
	if want&0o111 != 0 {
		return "rx"
	}
	return "r"
}

// checkTimer looks for the link by which systemd starts the timer, where there is a systemd that could.
func (x examined) checkTimer() []finding {
	const timer = "ftclock-anchor.timer"
	there := func(path string) bool {
		_, err := os.Lstat(x.path(path))
		return err == nil
	}
	if !there("/run/systemd/system") || !there("/usr/lib/systemd/system/"+timer) && !there("/usr/local/lib/systemd/system/"+timer) {
		return nil
	}
	if there("/etc/systemd/system/timers.target.wants/" + timer) {
		return []finding{{good, timer + " is enabled: migrations are caught up from what it publishes", ""}}
	}
	return []finding{{warn, timer + " isn't enabled: migrations, and restores on another host, are held unless somebody else publishes anchors",
		"systemctl enable --now " + timer}}
}

// --- what may forbid the attach ---

func (x examined) checkPtrace() finding {
	const path = "/proc/sys/kernel/yama/ptrace_scope"
	scope, err := x.read(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return finding{good, "ptrace isn't restricted: the kernel has no Yama", ""}
	case err != nil:
		return finding{warn, sayError(err), "see that /proc/sys is mounted and may be read"}
	case scope == "3":
		return finding{warn, "kernel.yama.ptrace_scope is 3: nobody may attach to QEMU, until a reboot",
			"set it to 2 or less in /etc/sysctl.d and reboot, or use `ftclock enable --preload`"}
	}
	return finding{good, "kernel.yama.ptrace_scope is " + scope + ": root may attach to QEMU", ""}
}

func (x examined) checkAppArmor() finding {
	if enabled, err := x.read("/sys/module/apparmor/parameters/enabled"); err != nil || enabled != "Y" {
		return finding{good, "AppArmor is off", ""}
	}
	return finding{good, "AppArmor is on",
		"libvirt's profiles allow ftclock in /usr/sbin and /usr/lib, where its packages are (make install PREFIX=/usr)"}
}

func (x examined) checkSELinux() finding {
	enforcing, err := x.read("/sys/fs/selinux/enforce")
	switch {
	case err != nil:
		return finding{good, "SELinux is off", ""}
	case enforcing == "1":
		return finding{good, "SELinux is enforcing",
			"it needs: semodule -i /usr/share/selinux/packages/ftclock.pp; restorecon -v /usr/sbin/ftclock-shim; " +
				"LD_PRELOAD (enable --preload) doesn't hold"}
	}
	return finding{good, "SELinux is permissive", ""}
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
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return finding{warn, "asking for the host clock's state: " + err.Error(), "allow adjtimex(2), which a container or a sandbox may forbid"}
	}
	if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		return finding{warn, "the host's clock isn't synchronised: policies with reference=\"utc\" follow a clock that is off",
			"run chrony, or another client of NTP or PTP"}
	}
	return finding{good, fmt.Sprintf("the host's clock is synchronised, to within %s", sayNS(uint64(max(t.Maxerror, 0))*1000)), ""}
}
