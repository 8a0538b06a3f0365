package host

import (
	"os"
	"path/filepath"
	"strings"
)

// Where libvirt's system instance keeps its files, qemu:///system as distributions build it.
const (
	// LibvirtRun has a pid file and a status file for each running domain.
	LibvirtRun = "/run/libvirt/qemu"
	// LibvirtLib has a directory for each running domain, with its monitor's socket.
	LibvirtLib = "/var/lib/libvirt/qemu"
)

// Where ftclock keeps its files.
const (
	// DataDir outlives a reboot. It has the records, a directory for each domain's UUID, and beside them UUID.json: what the
	// domain's clock read when its QEMU ended while it was paused, as after virsh save.
	DataDir = "/var/lib/ftclock"
	// LogDir has a log for each domain whose shim systemd doesn't run.
	LogDir = "/var/log/ftclock"
)

// SystemdRuns is a directory that is there where systemd runs the host: sd_booted(3).
const SystemdRuns = "/run/systemd/system"

// PIDFile is where libvirt, with its state in the directory run, keeps the pid of a domain's QEMU. It escapes the
// name as if it went into XML (libvirt's src/util/virpidfile.c, virPidFileBuildPath).
func PIDFile(run, domain string) string {
	return filepath.Join(run, escape.Replace(domain)+".pid")
}

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&apos;")

// WriteFile makes a file that is there as a whole or not at all, in the place of what was there, for this user alone. A loss of power
// may take it: it isn't synced.
func WriteFile(path string, content []byte) error {
	next := path + ".new"
	err := os.WriteFile(next, content, 0o600)
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next)
	}
	return err
}
