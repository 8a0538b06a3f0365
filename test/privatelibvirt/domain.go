package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"

	"ftclock/host"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/qmp"
)

// Connect connects to the private libvirt, never to the machine's.
func Connect() (*libvirt.Connect, error) {
	if !Inside() {
		return nil, errors.New("connecting to libvirt: not inside the private libvirt")
	}
	return libvirt.NewConnect(URI)
}

// Versions are those of libvirt, QEMU and the kernel. What can't be known is left out.
func Versions(conn *libvirt.Connect) (all []string) {
	add := func(name string, v uint32, err error) {
		if err == nil {
			all = append(all, fmt.Sprintf("%s %d.%d.%d", name, v/1_000_000, v/1000%1000, v%1000))
		}
	}
	v, err := conn.GetLibVersion()
	add("libvirt", v, err)
	v, err = conn.GetVersion()
	add("QEMU", v, err)
	var name unix.Utsname
	if err := unix.Uname(&name); err == nil {
		release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-") // what follows is the builder's
		all = append(all, "Linux "+release)
	}
	return all
}

// WithGuest is run for Main with what tests of domains need: the kvmclock guest,
// built into *elf, and a connection in *conn, which is closed afterwards.
func WithGuest(conn **libvirt.Connect, elf *string, run func() int) func() int {
	return func() int {
		var err error
		if *elf, err = guest.Copy(Dir); err != nil {
			panic(err)
		}
		if *conn, err = Connect(); err != nil {
			panic(err)
		}
		defer func(first *libvirt.Connect) { _, _ = first.Close() }(*conn)
		return run()
	}
}

// NoCPUProperties has libvirt believe that QEMU is too old to be asked for each of some 400 properties of the CPU, one after the
// other. In an emulated host they take more than half of a domain's start.
var NoCPUProperties = &libvirtxml.DomainQEMUCapabilities{Del: []libvirtxml.DomainQEMUCapabilitiesEntry{{Name: "cpu-unavailable-features"}}}

// GuestXML is a domain with the kvmclock guest: KVM, one CPU of the default
// model, 32 MiB in a memfd that others can map, no disk, no network. The
// caller adds what a test needs: Metadata, QEMUCommandline, Devices.
func GuestXML(name, elf string) *libvirtxml.Domain {
	var capabilities *libvirtxml.DomainQEMUCapabilities
	if kvmhost.Emulated() {
		capabilities = NoCPUProperties
	}
	return &libvirtxml.Domain{
		QEMUCapabilities: capabilities,

		Type:   "kvm",
		Name:   name,
		Memory: &libvirtxml.DomainMemory{Value: 32, Unit: "MiB"},
		MemoryBacking: &libvirtxml.DomainMemoryBacking{
			MemorySource: &libvirtxml.DomainMemorySource{Type: "memfd"},
			MemoryAccess: &libvirtxml.DomainMemoryAccess{Mode: "shared"},
		},
		OS: &libvirtxml.DomainOS{
			Type:   &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "pc", Type: "hvm"},
			Kernel: elf,
		},
		Devices: &libvirtxml.DomainDeviceList{
			Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
			MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
		},
	}
}

// AddMonitor gives the domain a second monitor, which libvirt doesn't know
// of, and returns the path of its socket.
func AddMonitor(x *libvirtxml.Domain) (string, error) {
	dir, err := QEMUDir("qmp")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, x.Name+".sock")
	AddArguments(x, "-chardev", "socket,id=second,path="+path+",server=on,wait=off", "-mon", "chardev=second,mode=control")
	return path, nil
}

// AddArguments adds to QEMU's command line.
func AddArguments(x *libvirtxml.Domain, args ...string) {
	if x.QEMUCommandline == nil {
		x.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{}
	}
	for _, a := range args {
		x.QEMUCommandline.Args = append(x.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
}

// QEMUDir makes a directory below Dir that QEMU's user may write to.
func QEMUDir(name string) (string, error) {
	if !Inside() {
		return "", errors.New("making a directory for QEMU: not inside the private libvirt")
	}
	dir := filepath.Join(Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Debian and its children call the user libvirt-qemu, others qemu.
	for _, name := range []string{"libvirt-qemu", "qemu"} {
		if u, err := user.Lookup(name); err == nil {
			uid, _ := strconv.Atoi(u.Uid)
			return dir, os.Chown(dir, uid, -1)
		}
	}
	return "", errors.New("making a directory for QEMU: neither user libvirt-qemu nor qemu exists")
}

// Domain is a domain of the private libvirt. Suspend, Resume and everything
// else that libvirt offers come from the binding.
type Domain struct {
	*libvirt.Domain
	Name string
}

// Define makes a persistent domain.
func Define(conn *libvirt.Connect, x *libvirtxml.Domain) (*Domain, error) {
	text, err := x.Marshal()
	if err != nil {
		return nil, fmt.Errorf("defining %s: %w", x.Name, err)
	}
	d, err := conn.DomainDefineXML(text)
	if err != nil {
		return nil, fmt.Errorf("defining %s: %w", x.Name, err)
	}
	return &Domain{Domain: d, Name: x.Name}, nil
}

// Remove destroys the domain if it runs and undefines it.
func (d *Domain) Remove() error {
	if active, err := d.IsActive(); err == nil && active {
		if err := d.Destroy(); err != nil {
			return fmt.Errorf("removing %s: %w", d.Name, err)
		}
	}
	if err := d.UndefineFlags(libvirt.DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.DOMAIN_UNDEFINE_SNAPSHOTS_METADATA); err != nil {
		return fmt.Errorf("removing %s: %w", d.Name, err)
	}
	return d.Free()
}

// PID is the domain's QEMU process.
func (d *Domain) PID() (int, error) {
	text, err := os.ReadFile(host.PIDFile(host.LibvirtRun, d.Name))
	if err != nil {
		return 0, fmt.Errorf("finding QEMU of %s: %w", d.Name, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// Clock opens the clock of a running domain with the kvmclock guest and waits
// until it moves.
func (d *Domain) Clock() (*guest.Clock, error) {
	pid, err := d.PID()
	if err != nil {
		return nil, err
	}
	c, err := guest.Open(pid)
	if err != nil {
		return nil, err
	}
	if err := c.WaitMoving(2 * time.Minute); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", d.Name, err)
	}
	return c, nil
}

// Monitor opens the monitor that AddMonitor made.
func (d *Domain) Monitor() (*qmp.Conn, error) {
	return qmp.Dial(filepath.Join(Dir, "qmp", d.Name+".sock"), 10*time.Second)
}
