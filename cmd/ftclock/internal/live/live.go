package live

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/attach"
	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	"ftclock/spawn"
	"ftclock/unit"
	metadata "ftclock/xml-templates"
)

// QEMU is a running QEMU that can be served: a domain of libvirt's, or a process that libvirt didn't start.
type QEMU struct {
	dirs   status.Dirs
	Domain *hypervisor.Domain
	pid    int    // QEMU's
	module string // path of the module
	guest  string // its guest's UUID, as its command line has it
	// Policy is the file of the host's policy that names it; "" is somebody who asked.
	Policy string
	paused bool
	fresh  bool // the module came in only now
}

// Find finds the QEMU of a domain that runs on this host. A command that changes only the definition gets nil, and an error
// where there is none. verb is the command's name, for hints.
func Find(at status.Dirs, d *hypervisor.Domain, running bool, verb string) (*QEMU, error) {
	if !running {
		if d.Persistent {
			return nil, nil
		}
		return nil, ui.Hinted(fmt.Errorf("%s is transient: it has no definition that a next start would use", d.Name),
			fmt.Sprintf("`ftclock %s --live %s` works on the running domain", verb, ui.ShellWord(d.Name)))
	}
	if err := d.Host.CheckLocal("--live"); err != nil {
		return nil, err
	}
	l, err := reach(at, d)
	if err != nil {
		return nil, err
	}
	if !d.Active {
		return nil, ui.Hinted(fmt.Errorf("%s isn't running, so there is nothing to do --live", d.Name),
			fmt.Sprintf("`ftclock %s %s` changes its definition, for the next start", verb, ui.ShellWord(d.Name)))
	}
	if l.pid, err = attach.FindQEMU("/", at.Libvirt, d.Name, d.UUID); err != nil {
		return nil, err
	}
	state, err := d.State()
	l.paused = state == libvirt.DOMAIN_PAUSED
	return l, err
}

// reach checks that this user may reach into QEMU's process, and finds the module.
func reach(at status.Dirs, d *hypervisor.Domain) (*QEMU, error) {
	if os.Geteuid() != 0 {
		return nil, ui.Hinted(errors.New("reaching into QEMU's process is for root only"), "run it as root")
	}
	module, err := spawn.ModulePath()
	return &QEMU{dirs: at, Domain: d, module: module}, err
}

// Serve gives the domain's shim a policy. Without a shim it starts one.
func (l *QEMU) Serve(ctx context.Context, policy metadata.Policy) error {
	clock := policy.XML()
	_, err := l.dirs.Ask(l.Domain.UUID, control.Request{Do: "policy", Clock: clock})
	switch {
	case err == nil:
		return nil
	case !status.NoShim(err):
		return fmt.Errorf("giving the shim of %s its policy: %w", l.Domain.Name, err)
	}
	if _, loaded, err := attach.Loaded(l.pid); err == nil && !loaded {
		if err := l.check(); err != nil {
			return ui.Hinted(fmt.Errorf("serving the running %s: %w", l.Domain.Name, err),
				"`ftclock doctor` checks the host; without --live it is for the next start")
		}
		l.fresh = true
	}
	return l.start(ctx, clock)
}

// check says whether the module can go in, as the shim would bring it in.
func (l *QEMU) check() error {
	if l.spec("").Sealed() {
		return attach.CheckSealed(l.pid, l.module)
	}
	return attach.Check(l.pid, l.module)
}

// spec is what the shim is told.
func (l *QEMU) spec(clock string) spawn.Spec {
	return spawn.Spec{UUID: l.Domain.UUID, Name: l.Domain.Name, Clock: clock, Policy: l.Policy, PID: l.pid, Module: l.module}
}

// startTime bounds the start of a shim, which waits for QEMU's main thread to load the module.
const startTime = time.Minute

// start starts a shim beside libvirt and QEMU.
func (l *QEMU) start(ctx context.Context, clock string) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	err := unit.Start(ctx, l.spec(clock))
	if err != nil {
		return ui.Hinted(fmt.Errorf("starting a shim for %s: %w", l.Domain.Name, err), "`ftclock doctor` checks the host")
	}
	return nil
}

// Report prints how the domain is served now. It returns ui.ErrProblem if its clock isn't corrected.
func (l *QEMU) Report(u *ui.UI) error {
	s, err := l.dirs.Status(l.Domain.UUID, 1)
	if err != nil {
		return fmt.Errorf("asking the shim of %s: %w", l.Domain.Name, err)
	}
	u.Printf("%s: served from now on\n", l.Domain.Name)
	if l.paused && l.fresh { // the module didn't see the stop
		u.Printf("%s: is paused, and this pause isn't caught up: the next one is\n", l.Domain.Name)
	}
	if s.Mode == control.Relay && status.Direct(s) {
		u.Printf("%s: its monitor is relayed until it stops\n", l.Domain.Name)
	}
	e := status.Entry{Status: *s}
	status.PrintTable(u, []status.Entry{e}, false)
	if e.Bad() {
		return ui.ErrProblem
	}
	return nil
}

// Served tells whether a shim answers for the domain.
func Served(at status.Dirs, uuid string) bool {
	_, err := at.Status(uuid, 0)
	return err == nil
}

// Leave stops correcting the domain's clock, and words what it did.
func (l *QEMU) Leave(ctx context.Context) (said string, err error) {
	s, err := l.dirs.Status(l.Domain.UUID, 0)
	mode := control.Watch
	switch {
	case err == nil:
		mode = s.Mode
	case !status.NoShim(err):
		return "", err
	default:
		if _, loaded, err := attach.Loaded(l.pid); err != nil {
			return "", err
		} else if !loaded {
			return "its clock wasn't corrected", nil
		}
		// Without a shim the module follows the last policy: a new shim has to take that back.
		if err := l.start(ctx, ""); err != nil {
			return "", err
		}
	}
	if _, err = l.dirs.Ask(l.Domain.UUID, control.Request{Do: "policy"}); err != nil {
		return "", err
	}
	if mode == control.Relay {
		return "its clock is no longer corrected; the shim relays the monitor until the domain stops", nil
	}
	if _, err = l.dirs.Ask(l.Domain.UUID, control.Request{Do: "quit"}); err != nil {
		return "", err
	}
	return "its clock is no longer corrected, and the shim has ended", nil
}

// FindProcess finds a QEMU by its pid. It has a name and a UUID as a domain of libvirt's has.
func FindProcess(at status.Dirs, pid int) (*QEMU, error) {
	l, err := reach(at, &hypervisor.Domain{})
	if err != nil {
		return nil, err
	}
	if pid <= 1 {
		return nil, fmt.Errorf("%d isn't a QEMU process", pid)
	}
	stat, err := host.ReadStat(pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no process %d", pid)
	}
	if err != nil {
		return nil, err
	}
	name, uuid, err := attach.Guest("/proc", pid)
	if err != nil {
		return nil, err
	}
	l.pid, l.guest = pid, uuid
	l.Domain.Name = cmp.Or(host.OneLine(name), "qemu-"+strconv.Itoa(pid))
	l.Domain.UUID = host.ProcessUUID(pid, stat.Started)
	return l, nil
}

// Left says why a QEMU is to be left alone by who serves them unasked; "" where it isn't. ours says that it is served as Serve would.
func (l *QEMU) Left() (why string, ours bool, err error) {
	if _, err := l.dirs.Status(l.Domain.UUID, 0); err == nil {
		return "", true, nil
	} else if !status.NoShim(err) {
		return "", false, fmt.Errorf("asking the shim of %s: %w", l.Domain.Name, err)
	}
	if why := l.hooked(); why != "" {
		return why, false, nil
	}
	fd, loaded, err := attach.Loaded(l.pid)
	if err != nil || !loaded {
		return "", false, err
	}
	switch sealed, err := attach.LoadedSealed(l.pid); {
	case err != nil:
		return "", false, err
	case !sealed:
		return "ftclock's module is in it already, by libvirt's hook or an ftclock in its container", false, nil
	}
	// A module of ours, whose shim has gone. It follows its last policy.
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", l.pid, fd), os.O_RDWR, 0)
	if err != nil {
		return "", false, fmt.Errorf("opening the clock page of process %d: %w", l.pid, err)
	}
	defer f.Close()
	page, err := clockpage.Map(f)
	if err != nil {
		return "", false, fmt.Errorf("opening the clock page of process %d: %w", l.pid, err)
	}
	defer page.Close()
	if policy, err := page.Policy(); err == nil && policy.Enabled == 0 {
		return fmt.Sprintf("its correction was switched off; `ftclock attach %d` switches it on", l.pid), false, nil
	}
	return "", false, nil
}

// hooked says that libvirt's hook of this host is who serves the QEMU; "" where it isn't.
func (l *QEMU) hooked() string {
	if !host.IsUUID(l.guest) {
		return ""
	}
	if s, err := l.dirs.Status(l.guest, 0); err == nil && s.QEMU == l.pid {
		return "a shim serves it as a domain of this host's libvirt"
	}
	if strings.Contains(l.Domain.Name, "/") { // which no domain of libvirt's has
		return ""
	}
	if pid, err := attach.FindQEMU("/", l.dirs.Libvirt, l.Domain.Name, l.guest); err == nil && pid == l.pid {
		return fmt.Sprintf("it is a domain of this host's libvirt, whose hook serves it from a start on; `ftclock enable --live %s` has it served now",
			ui.ShellWord(l.Domain.Name))
	}
	return ""
}
