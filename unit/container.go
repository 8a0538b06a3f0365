package unit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"ftclock/spawn"
)

// libvirtd may run in a container that has the host's processes before it. Such a container is restarted at will, and the domains go
// on meanwhile, as systemd-machined has put each QEMU into a control group of its own. A shim that was started in the container would
// end with it, and a domain whose monitor closes is lost. So a shim's place is then a unit of the host's systemd, and nowhere else. It
// is reached by the host's bus, and runs the host's program on the host's files: so both have to be where the container has its own.

// sameFix is the fix where a directory of the container's isn't the host's.
const sameFix = "fix: give the container the host's directories at the same places: --volume /run:/run:shared --volume /var/lib/libvirt:/var/lib/libvirt"

// contained says whether this process is in a container whose host's process 1 it sees: their root directories differ. Where there
// is no telling, it isn't. In a container with processes of its own, QEMU ends with it as everything else does, and process 1 is
// the container's.
func (h Host) contained() bool {
	ours, err := os.Stat(h.Root)
	if err != nil {
		return false
	}
	theirs, err := os.Stat(h.InitRoot)
	return err == nil && !os.SameFile(ours, theirs)
}

// outside is where the container finds a path of the host's.
func (h Host) outside(path string) string { return filepath.Join(h.InitRoot, path) }

// startOutside has the host's systemd start the shim, from in a container.
func (h Host) startOutside(ctx context.Context, o spawn.Spec) error {
	if err := h.reaches(o); err != nil {
		return err
	}
	differs := h.differs()
	if differs != "" {
		h.Note(o.Name, differs)
	}
	// The state is the same directory on both sides. The readings needn't be.
	h.LastStops = h.outside(h.LastStops)
	err := h.byUnit(ctx, o)
	var not notStarted
	switch {
	case err == nil:
		return nil
	case errors.As(err, &not) && not.unknown:
		return fmt.Errorf("the host's systemd doesn't know %s, and a shim in this container would end with it; "+
			"fix: install ftclock on the host, too, at the same place and in the same version", Name(o.UUID))
	case errors.As(err, &not):
		err = fmt.Errorf("the host's systemd didn't start the shim, and one in this container would end with it: %w", err)
	}
	if differs != "" {
		err = fmt.Errorf("%w; %s", err, differs)
	}
	return err
}

// reaches checks that the host's systemd can be asked, and that it has what the shim and libvirt meet in where this container has it.
func (h Host) reaches(o spawn.Spec) error {
	if !isDir(h.Booted) {
		if isDir(h.outside(h.Booted)) {
			return errors.New("libvirt runs in a container that doesn't have the host's /run, so the host's systemd can't start the shim, and one in this container would end with it; " + sameFix)
		}
		return errors.New("libvirt runs in a container whose host has no systemd to start the shim, and one in this container would end with it; " +
			"fix: run libvirt on the host itself")
	}
	if err := os.MkdirAll(h.State, 0o711); err != nil {
		return fmt.Errorf("making the shims' directory: %w", err)
	}
	dirs := []string{h.State}
	if o.DomainDir != "" {
		dirs = append(dirs, filepath.Dir(o.PIDFile), o.DomainDir)
	}
	for _, dir := range dirs {
		ours, err := os.Stat(dir)
		if err != nil {
			return fmt.Errorf("looking at %s: %w", dir, err)
		}
		if theirs, err := os.Stat(h.outside(dir)); err != nil || !os.SameFile(ours, theirs) {
			return fmt.Errorf("libvirt runs in a container whose %s isn't the host's, where the shim runs; %s", dir, sameFix)
		}
	}
	return nil
}

// differs says how the host's shim differs from this container's; "" where it doesn't. That isn't an error yet: an order that the
// host's shim doesn't understand is, and so is a module, which is the container's, whose page it doesn't know.
func (h Host) differs() string {
	path, err := h.Shim()
	if err != nil {
		return "" // what is in the container isn't what runs
	}
	theirs, err := version(h.outside(path))
	if err != nil {
		return fmt.Sprintf("the host has no %s that runs: %v; fix: install ftclock on the host, too, at the same place and in the same version", path, err)
	}
	if ours, err := version(path); err == nil && ours != theirs {
		return fmt.Sprintf("the host has %s and this container %s; fix: install the same version of ftclock in both", theirs, ours)
	}
	return ""
}

func version(program string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askWait)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "-version").Output()
	return strings.TrimSpace(string(out[:min(len(out), 100)])), err
}

// numberless says whether who listens on the socket at path has no number here, as it is outside of this process's pid namespace
// (pid_namespaces(7)). A bus that is shared with a container with processes of its own is such: a systemd that can't know QEMU by the
// number that libvirt has for it. QEMU ends with that container, and a shim in it may.
func numberless(path string) bool {
	conn, err := net.DialTimeout("unix", path, askWait)
	if err != nil {
		return false
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	var peer *unix.Ucred
	failed := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return failed == nil && err == nil && peer.Pid == 0
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
