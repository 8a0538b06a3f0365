package status

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

// processEnded tells whether the process has ended; the pid may have become another's. A process that can't be looked at, as with
// hidepid (proc(5)), is taken for the same one.
func processEnded(pid int, started uint64) bool {
	if err := unix.Kill(pid, 0); errors.Is(err, unix.ESRCH) {
		return true
	}
	stat, err := host.ReadStat(pid)
	return err == nil && (stat.Started != started || stat.State == 'Z')
}

// correct is the command that has a running domain, or a QEMU that libvirt didn't start, served at once.
func correct(name, uuid string) string {
	if pid, _, ok := host.ProcessOf(uuid); ok {
		return fmt.Sprintf("ftclock attach %d", pid)
	}
	return "ftclock enable --live " + ui.ShellWord(name)
}

// lost is the state of a domain whose shim left its directory behind, and why it is so. known are libvirt's; nil: it wasn't asked.
func (at Dirs) lost(info control.Info, known map[string]Known) (control.State, string) {
	ended := false
	if pid, started, ok := host.ProcessOf(info.UUID); ok {
		ended = processEnded(pid, started)
	} else if known != nil {
		f, isKnown := known[info.UUID]
		ended = !isKnown || f.ID == ""
	}
	if ended {
		return Off, "a shim that was killed left " + filepath.Join(at.Shims, info.UUID)
	}
	return Gone, "its shim was killed or crashed" + at.andModule(info.Name, info.UUID)
}
