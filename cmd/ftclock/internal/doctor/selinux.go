package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/spawn"
)

// selinux asks the policy that the kernel has loaded, by selinuxfs (Documentation/ABI and security/selinux/selinuxfs.c in the kernel).
type selinux struct {
	examined
	// transact writes a question to a file of selinuxfs, and reads the answer. Tests have their own.
	transact func(path, question string) (string, error)
}

const selinuxfs = "/sys/fs/selinux/"

func transact(path, question string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := f.WriteString(question); err != nil {
		return "", fmt.Errorf("asking %s for %q: %w", path, question, err)
	}
	answer := make([]byte, 4096)
	n, err := f.Read(answer)
	return strings.TrimRight(string(answer[:max(n, 0)]), "\x00\n"), err
}

// number is what selinuxfs has in a file below class.
func (s selinux) number(path string) (uint64, error) {
	text, err := s.read(selinuxfs + "class/" + path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(text, 10, 16)
}

// transition is the context that a process of source gets by executing a file of target.
func (s selinux) transition(source, target string) (string, error) {
	class, err := s.number("process/index")
	if err != nil {
		return "", err
	}
	return s.transact(s.path(selinuxfs+"create"), fmt.Sprintf("%s %s %d", source, target, class))
}

// denied is what of the permissions source lacks on target, where the source isn't a permissive domain.
func (s selinux) denied(source, target, class string, permissions ...string) (lacks []string, err error) {
	index, err := s.number(class + "/index")
	if err != nil {
		return nil, err
	}
	answer, err := s.transact(s.path(selinuxfs+"access"), fmt.Sprintf("%s %s %d", source, target, index))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(answer) // allowed decided auditallow auditdeny seqno flags
	if len(fields) < 6 {
		return nil, fmt.Errorf("the policy answers %q", answer)
	}
	allowed, err := strconv.ParseUint(fields[0], 16, 32)
	flags, ferr := strconv.ParseUint(fields[5], 16, 32)
	const permissive = 1
	if err = errors.Join(err, ferr); err != nil || flags&permissive != 0 {
		return nil, err
	}
	for _, permission := range permissions {
		bit, err := s.number(class + "/perms/" + permission)
		if err != nil {
			return nil, err
		}
		if bit == 0 || bit > 32 || allowed>>(bit-1)&1 == 0 {
			lacks = append(lacks, permission)
		}
	}
	return lacks, nil
}

// Contexts of libvirt's, in every policy that has its domains at all.
const (
	svirt      = "system_u:system_r:svirt_t:s0"
	svirtTmpfs = "system_u:object_r:svirt_tmpfs_t:s0"
)

// check asks for what the shim does: it is started by systemd, loads the module into QEMU, opens its page, and has libvirt connect.
func (s selinux) check(shimFile string) Finding {
	const fix = "semodule -i /usr/share/selinux/packages/ftclock.pp; restorecon -Rv /usr/sbin/ftclock-shim /usr/lib/systemd/system/ftclock-shim@.service /run/ftclock"
	enforcing, err := s.read(selinuxfs + "enforce")
	switch {
	case err != nil:
		return Finding{good, "SELinux is off", ""}
	case enforcing != "1":
		return Finding{good, "SELinux is permissive", ""}
	}
	context := func(path string) string {
		text, _ := s.read(path)
		return strings.TrimRight(text, "\x00")
	}
	shim, err := s.transition(context("/proc/1/attr/current"), shimFile)
	if err != nil {
		return Finding{warn, "asking SELinux what the shim may do: " + ui.ErrorText(err), seeDenials}
	}
	type question struct {
		source, target, class string
		permissions           []string
	}
	questions := []question{
		{shim, svirt, "process", []string{"ptrace"}},
		{shim, svirt, "file", []string{"open", "read", "write"}}, // /proc/PID/mem
		{svirt, svirtTmpfs, "file", []string{"map"}},             // the page
		{shim, svirtTmpfs, "file", []string{"open", "read", "write", "map"}},
	}
	for _, daemon := range s.daemons() {
		questions = append(questions, question{context(daemon + "/attr/current"), shim, "unix_stream_socket", []string{"connectto"}})
	}
	var all []string
	for _, q := range questions {
		lacks, err := s.denied(q.source, q.target, q.class, q.permissions...)
		if err != nil {
			return Finding{warn, "asking SELinux what the shim may do: " + ui.ErrorText(err), seeDenials}
		}
		if len(lacks) > 0 {
			all = append(all, fmt.Sprintf("%s may not %s %s:%s", typeOf(q.source), strings.Join(lacks, ", "), typeOf(q.target), q.class))
		}
	}
	if len(all) > 0 {
		return Finding{bad, "SELinux is enforcing, and its policy doesn't let ftclock work: " + strings.Join(all, "; "), fix}
	}
	return Finding{good, "SELinux is enforcing, and its policy lets the shim work, as " + typeOf(shim), ""}
}

// daemons are the /proc directories of libvirt's daemons that start QEMUs.
func (s selinux) daemons() (found []string) {
	comms, _ := filepath.Glob(s.path("/proc/[0-9]*/comm"))
	for _, comm := range comms {
		dir := "/proc/" + filepath.Base(filepath.Dir(comm))
		if name, _ := s.read(dir + "/comm"); name == "libvirtd" || name == "virtqemud" {
			found = append(found, dir)
		}
	}
	return found
}

func typeOf(context string) string {
	if parts := strings.Split(context, ":"); len(parts) > 2 {
		return parts[2]
	}
	return context
}

func (x examined) checkSELinux() Finding {
	shim, err := spawn.ShimPath()
	label := make([]byte, 256)
	n := 0
	if err == nil {
		n, err = unix.Getxattr(shim, "security.selinux", label)
	}
	if err != nil {
		n = 0
	}
	return selinux{examined: x, transact: transact}.check(strings.TrimRight(string(label[:n]), "\x00"))
}
