package linuxguest

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

const kernelVariable = "FTCLOCK_TEST_KERNEL"

//go:embed src/init.c
var sources embed.FS

// Missing says what this machine lacks for a Linux guest, one line each, with
// the fix.
func Missing() []string {
	var missing []string
	if _, err := kernel(); err != nil {
		missing = append(missing, err.Error())
	}
	for _, program := range []string{"gcc", "xz"} {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Sprintf("%s is not installed; fix: apt-get install gcc xz-utils", program))
		}
	}
	return missing
}

// emulated tells whether this machine's CPU has no hardware virtualization, so
// that KVM is some other hypervisor's.
func emulated() bool {
	info, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && !regexp.MustCompile(`(?m)^flags\s*:.* (vmx|svm)( |$)`).Match(info)
}

func kernel() (string, error) {
	if path := os.Getenv(kernelVariable); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("%s: %w; fix: let it name a vmlinux or vmlinuz", kernelVariable, err)
		}
		return path, nil
	}
	if emulated() {
		return "", fmt.Errorf("the CPU has neither vmx nor svm, a distribution's kernel doesn't boot here; "+
			"fix: let %s name a kernel that does, see test/linuxguest/doc.go", kernelVariable)
	}
	kernels, err := filepath.Glob("/boot/vmlinuz-*")
	if err != nil || len(kernels) == 0 {
		return "", fmt.Errorf("no kernel in /boot; fix: apt-get install linux-image-amd64, or let %s name one", kernelVariable)
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

// Build compiles the init, packs the initramfs and unpacks the kernel into dir.
func Build(dir string) (*Image, error) {
	from, err := kernel()
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	image := &Image{Kernel: filepath.Join(dir, "linux"), Initrd: filepath.Join(dir, "initramfs")}
	packed, err := os.ReadFile(from)
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	if bytes.HasPrefix(packed, []byte("\xfd7zXZ\x00")) {
		xz := exec.Command("xz", "--decompress", "--stdout")
		xz.Stdin = bytes.NewReader(packed)
		if packed, err = xz.Output(); err != nil {
			return nil, fmt.Errorf("building Linux guest: unpacking %s: %w", from, err)
		}
	}
	if err := os.WriteFile(image.Kernel, packed, 0o644); err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	init, err := BuildInit(dir)
	if err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	if err := os.WriteFile(image.Initrd, archive(init), 0o644); err != nil {
		return nil, fmt.Errorf("building Linux guest: %w", err)
	}
	return image, nil
}

// BuildInit compiles the init alone. It also runs as any process of another Linux guest.
func BuildInit(dir string) ([]byte, error) {
	src, err := os.MkdirTemp(dir, "init-source-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(src)
	if err := os.CopyFS(src, sources); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(src, "src/record.h"), guest.RecordHeader, 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(src, "init")
	gcc := exec.Command("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-ffreestanding",
		"-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none", "-fno-pic", "-no-pie",
		"-Wl,-z,noexecstack", "-Wl,--build-id=none", "-o", out, filepath.Join(src, "src/init.c"))
	if text, err := gcc.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

// archive packs init into a cpio of the newc format with the nodes that the
// kernel wants before it starts init: see the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst.
func archive(init []byte) []byte {
	const (
		directory, file, device = 0o040755, 0o100755, 0o020600
	)
	var out bytes.Buffer
	pad := func() {
		for out.Len()%4 != 0 {
			out.WriteByte(0)
		}
	}
	inode := 0
	add := func(name string, mode, major, minor int, data []byte) {
		inode++
		fmt.Fprintf(&out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", inode, mode, 0, 0, 1, 0,
			len(data), 0, 0, major, minor, len(name)+1, 0)
		out.WriteString(name + "\x00")
		pad()
		out.Write(data)
		pad()
	}
	add("dev", directory, 0, 0, nil)
	add("dev/console", device, 5, 1, nil)
	add("init", file, 0, 0, init)
	inode = -1
	add("TRAILER!!!", 0, 0, 0, nil)
	return out.Bytes()
}

// XML is a domain that boots the image under the private libvirt. Its console
// goes to the file that Console names.
func XML(name string, image *Image) *libvirtxml.Domain {
	x := privatelibvirt.GuestXML(name, image.Kernel)
	x.Memory.Value = 256
	x.OS.Initrd = image.Initrd
	x.OS.Cmdline = "console=ttyS0 clocksource=kvm-clock quiet"
	x.Clock = &libvirtxml.DomainClock{Offset: "utc", Timer: []libvirtxml.DomainTimer{{Name: "kvmclock", Present: "yes"}}}
	port := uint(0)
	x.Devices.Serials = []libvirtxml.DomainSerial{{
		Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: Console(name)}},
		Target: &libvirtxml.DomainSerialTarget{Port: &port},
	}}
	if emulated() {
		// What such a hypervisor doesn't emulate must neither be offered nor used.
		x.Memory.Value = 64
		x.CPU = &libvirtxml.DomainCPU{Mode: "custom", Check: "none", Model: &libvirtxml.DomainCPUModel{Value: "qemu64"}}
		for _, feature := range []string{"cx16", "pni", "xsave"} {
			x.CPU.Features = append(x.CPU.Features, libvirtxml.DomainCPUFeature{Policy: "disable", Name: feature})
		}
		x.OS.Cmdline += " lpj=22500000 initcall_blacklist=ptp_kvm_init clearcpuid=smap,smep,fsgsbase,pcid,invpcid," +
			"umip,pku,cx16,rdpid,popcnt,erms,fsrm,xsave,avx,avx2"
	}
	return x
}

// Console is the file that a domain's console goes to.
func Console(name string) string {
	return filepath.Join("/var/log/libvirt/qemu", name+".console")
}

var errNotFound = errors.New("guest's init has not started")
