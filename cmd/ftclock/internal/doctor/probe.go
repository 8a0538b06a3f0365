package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"

	"ftclock/cmd/ftclock/internal/engine"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// The probe is a managed domain that lives for a second, without disk and network. It goes through libvirt, hook, shim and module,
// and is paused a few times. Its firmware is guest enough: SeaBIOS uses kvmclock. Name and UUID are always the same, so that the next
// probe removes what a killed doctor left.
const (
	ProbeName = "ftclock-probe"
	probeUUID = "3d848589-802b-42bb-b249-496b2808830a"
)

const (
	probePauses  = 3
	probeEndWait = 20 * time.Second // for the end of its shim
)

// prober makes probes.
type prober struct {
	dirs status.Dirs
	host *hypervisor.Host
}

// probe starts a probe domain on each of these QEMU programs.
func (p prober) probe(ctx context.Context, emulators []string) []Finding {
	// A second doctor at the same time must not remove the first one's domain.
	lock, err := os.Open("/proc/self/exe")
	if err == nil {
		defer lock.Close()
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			err = errors.New("another `ftclock doctor` is running")
		}
	}
	if err == nil {
		err = p.noProbe()
	}
	if err != nil {
		return []Finding{{warn, "no probe domain was tried: " + ui.ErrorText(err), "run it again when no other `ftclock doctor` runs"}}
	}
	var findings []Finding
	for _, emulator := range emulators {
		if ctx.Err() == nil {
			findings = append(findings, p.probeOne(ctx, emulator)...)
		}
	}
	return findings
}

// noProbe refuses a domain with the name or UUID of the probe. It is no leftover: libvirt destroys a probe with its connection.
func (p prober) noProbe() error {
	found, err := p.host.LookupDomainByName(ProbeName)
	if err != nil {
		found, err = p.host.LookupDomainByUUIDString(probeUUID)
	}
	if err != nil {
		return nil
	}
	_ = found.Free()
	return fmt.Errorf("there is a domain with the name %s or the UUID %s", ProbeName, probeUUID)
}

func (p prober) probeOne(ctx context.Context, emulator string) (findings []Finding) {
	p.removeFiles() // of a doctor that was killed
	defer func() { findings = append(findings, p.removeProbe()...) }()

	text, err := probeXML(emulator).Marshal()
	if err != nil {
		return []Finding{{bad, "writing the probe's definition: " + err.Error(), "please report it"}}
	}
	d, err := p.host.DomainCreateXML(text, libvirt.DOMAIN_START_AUTODESTROY)
	if err != nil {
		return []Finding{judgeProbeStart(emulator, err)}
	}
	defer d.Free()
	before, err := p.ask()
	if err != nil || before.State != control.Correcting {
		return []Finding{judgeProbe(emulator, before, err)}
	}
	findings = []Finding{{good, "libvirt calls the hook, and " + emulator + " takes the module: a probe domain was started", ""}}
	return append(findings, p.pause(ctx, d, before)...)
}

// probeXML is the smallest definition that libvirt starts.
func probeXML(emulator string) *libvirtxml.Domain {
	return &libvirtxml.Domain{
		Type: "kvm", Name: ProbeName, UUID: probeUUID,
		Title:    "a probe of ftclock doctor, removed in a moment",
		Memory:   &libvirtxml.DomainMemory{Value: 16, Unit: "MiB"},
		Metadata: &libvirtxml.DomainMetadata{XML: metadata.Default().XML()},
		OS:       &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Type: "hvm"}},
		Devices: &libvirtxml.DomainDeviceList{
			Emulator:    emulator,
			Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
			MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
		},
	}
}

// judgeProbeStart tells whether ftclock refused the start, or libvirt or QEMU failed by themselves.
func judgeProbeStart(emulator string, err error) Finding {
	message := ui.ErrorText(err)
	if i := strings.LastIndex(message, " ftclock: "); i >= 0 {
		return Finding{bad, "a probe domain on " + emulator + " can't be served: " + message[i+len(" ftclock: "):],
			seePage}
	}
	if strings.Contains(message, filepath.Base(hookLink)) {
		return Finding{bad, "libvirt can't run the hook: " + message, "ls -lL " + hookLink + ", and look for denials in the kernel's log"}
	}
	return Finding{bad, "libvirt can't start a domain with KVM on " + emulator + ": " + message, "libvirt or QEMU needs fixing, not ftclock: `virt-host-validate qemu` checks them"}
}

// ask asks the probe's shim for its status.
func (p prober) ask() (*control.Status, error) {
	return p.dirs.Status(probeUUID, status.MaxRecords)
}

func judgeProbe(emulator string, status *control.Status, err error) Finding {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return Finding{bad, "libvirt doesn't call the hook: a probe domain on " + emulator + " ran without a shim, and so would every managed domain",
			"systemctl restart libvirtd (or virtqemud; domains keep running): it looks for hooks when it starts. If that doesn't help, it was built to " +
				"look elsewhere than " + filepath.Dir(hookLink) + ": link ftclock-hook there"}
	case err != nil:
		return Finding{bad, "a probe domain on " + emulator + ": " + ui.ErrorText(err), seeLog}
	}
	return Finding{bad, fmt.Sprintf("a probe domain on %s isn't corrected (%s): %s", emulator, status.State, cmp.Or(status.Why, "no reason is given")),
		seePage}
}

// pause pauses the probe a few times, and judges its clock by the readings at the stops.
func (p prober) pause(ctx context.Context, d *libvirt.Domain, before *control.Status) []Finding {
	e := &engine.Engine{Domain: d, Resumer: d.Resume}
	switch err := e.Sample(ctx, probePauses); {
	case errors.Is(err, context.Canceled):
		return nil
	case err != nil:
		return []Finding{{bad, "pausing a probe domain: " + ui.ErrorText(err), seePage}}
	}
	after, err := p.ask()
	if err != nil {
		return []Finding{{bad, "a probe domain's shim went: " + ui.ErrorText(err), seeLog}}
	}
	return []Finding{judgePauses(engine.Judge(before, after))}
}

func judgePauses(v engine.Verdict) Finding {
	if v.Why != "" {
		return Finding{bad, "a probe domain's clock doesn't hold: " + v.Why, "see the clocksource above; `dmesg | grep -i tsc` shows what the kernel says about the TSC"}
	}
	return Finding{good, "its clock held: " + v.Measured(), ""}
}

// removeProbe ends the probe if it runs, and removes its files. It looks the domain up, as a start that libvirt reports as failed
// may leave one.
func (p prober) removeProbe() []Finding {
	if d, err := p.host.LookupDomainByUUIDString(probeUUID); err == nil {
		defer d.Free()
		if err := d.Destroy(); err != nil && !errors.Is(err, libvirt.ERR_NO_DOMAIN) && !errors.Is(err, libvirt.ERR_OPERATION_INVALID) {
			return []Finding{{bad, "ending the probe domain: " + ui.ErrorText(err), "virsh destroy " + ProbeName}}
		}
	}
	for end := time.Now().Add(probeEndWait); p.dirs.HasShim(probeUUID) && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if p.dirs.HasShim(probeUUID) {
		return []Finding{{bad, "the probe domain has ended, and its shim hasn't", "see " + filepath.Join(p.dirs.Shims, probeUUID) + " and the shim's log"}}
	}
	if err := p.removeFiles(); err != nil {
		return []Finding{{warn, "removing what the probe domain left: " + err.Error(), "remove it by hand"}}
	}
	return nil
}

// removeFiles removes the probe's logs, records, readings and AppArmor profile. libvirt leaves the profile behind.
func (p prober) removeFiles() error {
	err := os.RemoveAll(record.Path(p.dirs.Records, probeUUID))
	for _, file := range []string{
		filepath.Join(p.dirs.Records, probeUUID+".json"),
		filepath.Join(host.LogDir, ProbeName+".log"),
		filepath.Join("/var/log/libvirt/qemu", ProbeName+".log"),
		filepath.Join("/etc/apparmor.d/libvirt", "libvirt-"+probeUUID),
		filepath.Join("/etc/apparmor.d/libvirt", "libvirt-"+probeUUID+".files"),
	} {
		if e := os.Remove(file); e != nil && !errors.Is(e, syscall.ENOENT) && !errors.Is(e, syscall.ENOTDIR) {
			err = errors.Join(err, e)
		}
	}
	return err
}
