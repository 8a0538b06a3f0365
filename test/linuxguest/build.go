package linuxguest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ftclock/test/built"
	"ftclock/test/initramfs"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

// Missing says what this machine lacks for a Linux guest, one line each, with
// the fix.
func Missing() []string {
	if _, err := kernel(); err != nil {
		return []string{err.Error()}
	}
	return nil
}

// kernel is the kernel that guests boot: the named one, or else that of the
// emulated host, which is the distribution's, or the machine's newest.
func kernel() (string, error) {
	if path := os.Getenv(kvmhost.GuestKernelVariable); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("%s: %w; fix: let it name a vmlinuz or vmlinux", kvmhost.GuestKernelVariable, err)
		}
		return path, nil
	}
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	if len(kernels) == 0 {
		return "", fmt.Errorf("no kernel in /boot; fix: apt-get install linux-image-amd64, or let %s name one", kvmhost.GuestKernelVariable)
	}
	slices.SortFunc(kernels, func(a, b string) int {
		x, _ := os.Stat(a)
		y, _ := os.Stat(b)
		if x == nil || y == nil {
			return strings.Compare(a, b)
		}
		return x.ModTime().Compare(y.ModTime())
	})
	return kernels[len(kernels)-1], nil
}

// Image is what a Linux guest boots.
type Image struct {
	Kernel, Initrd string
}

// Build packs the initramfs and copies the kernel into dir, where QEMU's user
// can read both.
func Build(dir string) (*Image, error) {
	from, err := kernel()
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	image := &Image{Kernel: filepath.Join(dir, "linux"), Initrd: filepath.Join(dir, "initramfs")}
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(image.Kernel, text, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	path, err := built.Path(built.LinuxInit)
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	init, err := os.ReadFile(path)
	if err == nil {
		var a initramfs.Archive
		a.Add("init", init)
		err = os.WriteFile(image.Initrd, a.Bytes(), 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	return image, nil
}

// XML is a domain that boots the image under the private libvirt, with so many
// vCPUs. Its console goes to the file that Console names.
func XML(name string, image *Image, vcpus uint) *libvirtxml.Domain {
	x := privatelibvirt.GuestXML(name, image.Kernel)
	x.Memory.Value = 256
	x.VCPU = &libvirtxml.DomainVCPU{Value: vcpus}
	x.CPU = &libvirtxml.DomainCPU{Mode: "host-passthrough"}
	x.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}}
	x.OS.Initrd = image.Initrd
	x.OS.Cmdline = "console=ttyS0 clocksource=kvm-clock quiet"
	if kvmhost.Emulated() {
		x.OS.Cmdline += " noxsave" // Linux 7.2 doesn't like the layout that the emulated processor has, and panics
	}
	x.Clock = &libvirtxml.DomainClock{Offset: "utc", Timer: []libvirtxml.DomainTimer{{Name: "kvmclock", Present: "yes"}}}
	port := uint(0)
	x.Devices.Serials = []libvirtxml.DomainSerial{{
		Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: Console(name)}},
		Target: &libvirtxml.DomainSerialTarget{Port: &port},
	}}
	return x
}

// Console is the file that a domain's console goes to.
func Console(name string) string {
	return filepath.Join("/var/log/libvirt/qemu", name+".console")
}

var errNotFound = errors.New("guest's init has not started")
