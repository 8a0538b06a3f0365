package main

import (
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

	"ftclock/control"
	machine "ftclock/host"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// The probe is a managed domain of a second's life, without disk and network: what it sees on its way through libvirt, hook, shim,
// module and some pauses is the doctor's proof. Its firmware is guest enough, as SeaBIOS uses kvmclock. Name and UUID are always the
// same, so that what a doctor leaves behind that was killed goes with the next one.
const (
	probeName = "ftclock-probe"
	probeUUID = "3d848589-802b-42bb-b249-496b2808830a"
)

const (
	probePauses  = 3
	probeEndWait = 20 * time.Second // for the end of its shim
)

// probe has a proof for each of the host's QEMU programs that matter.
func (h *host) probe(ctx context.Context, emulators []string) []finding {
	// Whoever runs a second doctor at the same time must not take the first one's domain away.
	lock, err := os.Open("/proc/self/exe")
	if err == nil {
		defer lock.Close()
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			err = errors.New("another doctor has one")
		}
	}
	if err == nil {
		err = h.noProbe()
	}
	if err != nil {
		return []finding{{warn, "no probe domain was tried: " + sayError(err), "run the doctor again when no other one runs"}}
	}
	var findings []finding
	for _, emulator := range emulators {
		if ctx.Err() == nil {
			findings = append(findings, h.probeOne(ctx, emulator)...)
		}
	}
	return findings
}

// noProbe refuses a domain that is there already and is no leftover: a probe goes with the connection that started it.
func (h *host) noProbe() error {
	found, err := h.LookupDomainByName(probeName)
	if err != nil {
		found, err = h.LookupDomainByUUIDString(probeUUID)
	}
	if err != nil {
		return nil
	}
	_ = found.Free()
	return fmt.Errorf("there is a domain with the name %s or the UUID %s", probeName, probeUUID)
}

func (h *host) probeOne(ctx context.Context, emulator string) (findings []finding) {
	removeProbeFiles() // of a doctor that was killed
	defer func() { findings = append(findings, h.removeProbe()...) }()

	text, err := probeXML(emulator).Marshal()
	if err != nil {
		return []finding{{bad, "writing the probe's definition: " + err.Error(), "please report it"}}
	}
	d, err := h.DomainCreateXML(text, libvirt.DOMAIN_START_AUTODESTROY)
	if err != nil {
		return []finding{judgeProbeStart(emulator, err)}
	}
	defer d.Free()
	before, err := askProbe()
	if err != nil || before.State != control.Correcting {
		return []finding{judgeProbe(emulator, before, err)}
	}
	findings = []finding{{good, "libvirt calls the hook, and " + emulator + " takes the module: a probe domain was started", ""}}
	return append(findings, pauseProbe(ctx, d, before)...)
}

// probeXML is the least that libvirt starts.
func probeXML(emulator string) *libvirtxml.Domain {
	return &libvirtxml.Domain{
		Type: "kvm", Name: probeName, UUID: probeUUID,
		Title:    "a probe of ftclock doctor's, gone in a moment",
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

// judgeProbeStart tells a start that ftclock refused from one that libvirt or QEMU can't make by themselves.
func judgeProbeStart(emulator string, err error) finding {
	message := sayError(err)
	if i := strings.LastIndex(message, " ftclock: "); i >= 0 {
		return finding{bad, "a probe domain on " + emulator + " can't be served: " + message[i+len(" ftclock: "):],
			"share/doc/ftclock/troubleshooting.md has the messages, and what to do"}
	}
	if strings.Contains(message, filepath.Base(hookLink)) {
		return finding{bad, "libvirt can't run the hook: " + message, "ls -lL " + hookLink + ", and look for denials in the kernel's log"}
	}
	return finding{bad, "libvirt can't start a domain with KVM on " + emulator + ": " + message, "`virt-host-validate qemu` looks further: it isn't ftclock's"}
}

// askProbe asks the shim when the domain has been started.
func askProbe() (*control.Status, error) {
	answer, err := control.Ask(shims, probeUUID, control.Request{Do: "status", Records: 256})
	if err == nil && answer.Status == nil {
		err = errors.New("the probe's shim answers without a status")
	}
	return answer.Status, err
}

func judgeProbe(emulator string, status *control.Status, err error) finding {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return finding{bad, "libvirt doesn't call the hook: a probe domain on " + emulator + " ran without a shim, and so would each managed one",
			"systemctl restart libvirtd (or virtqemud; domains keep running): it looks for hooks when it starts. If that doesn't help, it was built to " +
				"look elsewhere than " + filepath.Dir(hookLink) + ": link ftclock-hook there"}
	case err != nil:
		return finding{bad, "a probe domain on " + emulator + ": " + sayError(err), "the shim's log says more: /var/log/ftclock, or journalctl -t ftclock-shim"}
	}
	return finding{bad, fmt.Sprintf("a probe domain on %s isn't corrected (%s): %s", emulator, status.State, or(status.Why, "no reason is given")),
		"share/doc/ftclock/troubleshooting.md has the messages, and what to do"}
}

// pauseProbe lets it pause, and reads its clock back from the kernel at each stop.
func pauseProbe(ctx context.Context, d *libvirt.Domain, before *control.Status) []finding {
	e := &engine{domain: d, resumer: d.Resume}
	for range probePauses {
		sleep(ctx, verifyRest)
		if ctx.Err() != nil {
			return nil
		}
		if err := e.pause(ctx, verifyPause); err != nil {
			return []finding{{bad, "pausing a probe domain: " + sayError(err), "share/doc/ftclock/troubleshooting.md has the messages, and what to do"}}
		}
	}
	after, err := askProbe()
	if err != nil {
		return []finding{{bad, "a probe domain's shim went: " + sayError(err), "the shim's log says more: /var/log/ftclock, or journalctl -t ftclock-shim"}}
	}
	return []finding{judgePauses(judge(before, after))}
}

func judgePauses(v verdict) finding {
	if v.why != "" {
		return finding{bad, "a probe domain's clock doesn't hold: " + v.why, "see the clocksource above; `dmesg | grep -i tsc` tells what the kernel thinks of the TSC"}
	}
	return finding{good, fmt.Sprintf("its clock held: %s off after %s of %s in all", signedNS(v.off), count(uint64(v.pauses), "pause"), sayNS(v.lost)), ""}
}

// removeProbe ends the probe, whatever became of it, and removes what its life left on disk. It looks the domain up: a start that libvirt
// reports as failed may leave one.
func (h *host) removeProbe() []finding {
	if d, err := h.LookupDomainByUUIDString(probeUUID); err == nil {
		defer d.Free()
		if err := d.Destroy(); err != nil && !errors.Is(err, libvirt.ERR_NO_DOMAIN) && !errors.Is(err, libvirt.ERR_OPERATION_INVALID) {
			return []finding{{bad, "ending the probe domain: " + sayError(err), "virsh destroy " + probeName}}
		}
	}
	for end := time.Now().Add(probeEndWait); hasDir(probeUUID) && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if hasDir(probeUUID) {
		return []finding{{bad, "the probe domain has ended, and its shim hasn't", "see " + filepath.Join(shims, probeUUID) + " and the shim's log"}}
	}
	if err := removeProbeFiles(); err != nil {
		return []finding{{warn, "removing what the probe domain left: " + err.Error(), "remove it by hand"}}
	}
	return nil
}

// removeProbeFiles removes logs, records, readings and AppArmor's profile, which libvirt leaves where it was.
func removeProbeFiles() error {
	err := os.RemoveAll(record.Path(records, probeUUID))
	for _, file := range []string{
		filepath.Join(records, probeUUID+".json"),
		filepath.Join(machine.LogDir, probeName+".log"),
		filepath.Join("/var/log/libvirt/qemu", probeName+".log"),
		filepath.Join("/etc/apparmor.d/libvirt", "libvirt-"+probeUUID),
		filepath.Join("/etc/apparmor.d/libvirt", "libvirt-"+probeUUID+".files"),
	} {
		if e := os.Remove(file); e != nil && !errors.Is(e, syscall.ENOENT) && !errors.Is(e, syscall.ENOTDIR) {
			err = errors.Join(err, e)
		}
	}
	return err
}
