package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"ftclock/attach"
	"ftclock/control"
	"ftclock/host"
	"ftclock/policy"
	"ftclock/spawn"
	"ftclock/unit"
	metadata "ftclock/xml-templates"
)

// maxInput bounds the domain XML that is read, in bytes.
const maxInput = 16 << 20

// startWait bounds the shim's start: libvirt itself would wait for ever.
const startWait = 20 * time.Second

// kvm is the type of the domains that have the clock that ftclock keeps.
const kvm = "kvm"

// Host is where things are on this host.
type Host struct {
	Root  string // of the file system, "/" but in tests: where QEMU is looked for
	Lib   string // libvirt's domain directories are in here
	Run   string // libvirt's pid files
	State string // the shims' states
	// Policies has the files of the host's policy. Where there is no such directory, a domain without metadata costs no more than
	// to see that.
	Policies string
	// Start starts a shim. Note writes a warning into the log of a domain that has none.
	Start func(context.Context, spawn.Spec) error
	Note  func(domain, warning string)
}

// System is the system instance of libvirt, qemu:///system, as distributions build it.
var System = Host{
	Root:  "/",
	Lib:   host.LibvirtLib,
	Run:   host.LibvirtRun,
	State: control.Dir,

	Policies: policy.Dir,

	Start: unit.Start,
	Note:  spawn.Note,
}

// Run answers one call of libvirt's, with libvirt's arguments: the domain's name, the operation, the sub-operation
// and an extra one; the domain's XML is on stdin. A result other than 0 has libvirt give up what it was about to do, with
// what is on stderr as the reason. Nothing is ever written to stdout: at restore and migrate it would replace the XML.
func Run(h Host, args []string, stdin io.Reader, stderr io.Writer) int {
	if len(args) < 3 {
		fmt.Fprintln(stderr, "ftclock: this program is libvirt's qemu hook: libvirt calls it with a domain's name, an operation and a sub-operation")
		return 2
	}
	name, op, sub := args[0], args[1], args[2]
	xml, err := io.ReadAll(io.LimitReader(stdin, maxInput+1))
	switch op + " " + sub {
	case "start begin", "started begin", "migrate begin", "restore begin", "release end":
	default:
		return 0 // nothing to do, and in particular no reason ever to fail a reconnect
	}
	domain, origin, managed, err := h.read(op, xml, err)
	if !managed {
		return 0
	}
	if op != "start" && (err != nil || !host.IsUUID(domain.UUID)) {
		return 0 // the start says what is wrong
	}
	switch {
	case op == "release":
		h.release(domain.UUID)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "ftclock: starting domain %s: %s\n", name, host.ErrorLine(err))
		return 1
	case domain.Policy == nil:
		return 0 // no file names it, or our namespace is somewhere else in the XML
	case op == "migrate":
		h.expect(domain.UUID, control.Migrated)
		return 0
	case op == "restore":
		h.expect(domain.UUID, control.Restored)
		return 0
	}
	if op == "start" {
		err = h.start(domain, origin)
	} else {
		err = h.started(domain, origin)
	}
	switch {
	case err == nil:
	case domain.Policy.Required:
		fmt.Fprintf(stderr, "ftclock: starting domain %s: %s\n", name, host.ErrorLine(err))
		return 1
	default:
		// libvirt shows a hook's stderr only when it fails.
		h.Note(domain.Name, "starting uncorrected: "+host.ErrorLine(err)+"; `ftclock doctor` checks the host")
	}
	return 0
}

// read reads a domain's XML, and the host's policy for one whose metadata has none; origin says where a policy is from that isn't the
// domain's own. managed is false where there is nothing to do: failed, what reading the XML ended with, doesn't matter then.
func (h Host) read(op string, xml []byte, failed error) (d metadata.Domain, origin string, managed bool, err error) {
	managed = metadata.Managed(xml)
	if _, missing := os.Lstat(h.Policies); !managed && missing != nil {
		return d, "", false, nil
	}
	if err = failed; err == nil && len(xml) > maxInput {
		err = fmt.Errorf("the domain's XML is longer than %d bytes", maxInput)
	}
	if err == nil {
		d, err = metadata.Parse(xml)
	}
	if err != nil && !managed {
		return d, "", false, nil // no file can have named it
	}
	if err == nil && d.Policy == nil && op != "release" {
		origin, err = h.hostPolicy(&d, xml)
	}
	return d, origin, true, err
}

// hostPolicy gives a domain whose metadata has no policy that of the host, if one of its files names it, and says which. What is
// wrong with files that don't name it is the doctor's to say. A file that names it, and is wrong, is as bad as wrong metadata.
func (h Host) hostPolicy(d *metadata.Domain, xml []byte) (origin string, err error) {
	files, err := policy.Read(h.Policies)
	if err != nil || len(files) == 0 {
		return "", nil
	}
	subject, err := metadata.ReadSubject(d.Name, d.UUID, xml)
	if err != nil {
		return "", err
	}
	naming := policy.Naming(files, subject)
	if len(naming) == 0 {
		return "", nil
	}
	if first := naming[0]; first.Err == nil {
		d.Policy, origin = &first.Policy, first.Path
	}
	return origin, naming[0].Err
}

// start puts a shim between libvirt and the QEMU that is about to be started, unless the monitor is to be left alone. Either
// it succeeds, or everything is as it was.
func (h Host) start(d metadata.Domain, origin string) (err error) {
	if d.Type != kvm {
		return fmt.Errorf("its type is %s: only kvm has the clock that ftclock keeps", d.Type)
	}
	if d.Policy.Monitor == metadata.Direct {
		return nil
	}
	dir, err := h.domainDir(d)
	if err != nil {
		return err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the domain's directory %s: %w", dir, err)
	}
	defer unix.Close(fd)
	err = renameNoReplace(fd, control.MonitorSocket, control.QEMUSocket)
	if errors.Is(err, unix.EEXIST) {
		if err = removeStale(fd); err == nil {
			err = renameNoReplace(fd, control.MonitorSocket, control.QEMUSocket)
		}
	}
	if err != nil {
		return fmt.Errorf("renaming %s in %s: %w", control.MonitorSocket, dir, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startWait)
	defer cancel()
	options := h.options(d, origin)
	options.DomainDir, options.PIDFile = dir, host.PIDFile(h.Run, d.Name)
	err = h.Start(ctx, options)
	if err != nil {
		_ = unix.Unlinkat(fd, control.MonitorSocket, 0) // of a shim that got that far
		if back := unix.Renameat(fd, control.QEMUSocket, fd, control.MonitorSocket); back != nil {
			err = errors.Join(err, fmt.Errorf("renaming %s back: %w", control.MonitorSocket, back))
		}
	}
	return err
}

// started starts a shim beside the QEMU of a domain whose monitor was left alone. A guest that begins anew runs by then. One of
// which a state is loaded, from a file, a snapshot or another host, has its first cont still to come: libvirt starts it paused
// (src/qemu/qemu_process.c, qemuProcessFinishStartup, and who calls it).
func (h Host) started(d metadata.Domain, origin string) error {
	if d.Policy.Monitor != metadata.Direct || d.Type != kvm {
		return nil
	}
	pid, err := attach.FindQEMU(h.Root, h.Run, d.Name, d.UUID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startWait)
	defer cancel()
	options := h.options(d, origin)
	options.PID = pid
	return h.Start(ctx, options)
}

// options are those of a shim of either kind. They take the note of an incoming state.
func (h Host) options(d metadata.Domain, origin string) spawn.Spec {
	o := spawn.Spec{UUID: d.UUID, Name: d.Name, Clock: d.Policy.XML(), Policy: origin, Incoming: h.expected(d.UUID)}
	if d.Anchor != nil {
		o.Anchor = d.Anchor.XML()
	}
	if o.Incoming != "" && d.AnchorErr != nil {
		h.Note(d.Name, "the anchor that came with the domain can't be used: "+host.ErrorLine(d.AnchorErr))
	}
	return o
}

// renameNoReplace renames a file in a directory, unless the new name is taken. Not every file system can do that in one step.
func renameNoReplace(dir int, from, to string) error {
	err := unix.Renameat2(dir, from, dir, to, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	var st unix.Stat_t
	switch err := unix.Fstatat(dir, to, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == nil:
		return unix.EEXIST
	case !errors.Is(err, unix.ENOENT):
		return err
	}
	return unix.Renameat(dir, from, dir, to)
}

// domainDir finds the directory that libvirt has made for this start. Other domains' directories may lie beside it: a host that
// lost power leaves them behind, and counts its starts from 1 again.
func (h Host) domainDir(d metadata.Domain) (string, error) {
	if d.ID < 0 {
		return "", errors.New("its XML has no id: libvirt didn't say which start this is")
	}
	found, latest := "", unix.Timespec{}
	for _, short := range shortNames(d.Name) {
		dir := filepath.Join(h.Lib, "domain-"+strconv.Itoa(d.ID)+"-"+short)
		// libvirt has just made its socket.
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(dir, control.MonitorSocket), &st) != nil {
			continue
		}
		if found == "" || st.Ctim.Nano() > latest.Nano() {
			found, latest = dir, st.Ctim
		}
	}
	if found == "" {
		return "", fmt.Errorf("looking for libvirt's %s: not in %s; is libvirt older than 4.5, or not the system's?", control.MonitorSocket,
			filepath.Join(h.Lib, "domain-"+strconv.Itoa(d.ID)+"-"+shortNames(d.Name)[0]))
	}
	return found, nil
}

// shortNames are what libvirt may take of a domain's name for its directory's: the first 20 characters, as libvirtd's locale
// has them, so that without one it is bytes (virDomainDefGetShortName in libvirt's src/conf/domain_conf.c).
func shortNames(name string) []string {
	const most = 20
	bytes := name[:min(len(name), most)]
	if !utf8.ValidString(name) {
		return []string{bytes}
	}
	if runes := []rune(name); string(runes[:min(len(runes), most)]) != bytes {
		return []string{string(runes[:min(len(runes), most)]), bytes}
	}
	return []string{bytes}
}

// removeStale removes what a host that lost power left in the way: a socket of QEMU's that nobody listens on any more.
func removeStale(dir int) error {
	address := "/proc/self/fd/" + strconv.Itoa(dir) + "/" + control.QEMUSocket
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: address})
	if err == nil || errors.Is(err, unix.EAGAIN) { // EAGAIN: its backlog is full
		return fmt.Errorf("something listens on %s already: does a QEMU of an earlier start run? See `ps -C qemu-system-x86_64`", control.QEMUSocket)
	}
	return unix.Unlinkat(dir, control.QEMUSocket, 0)
}

// libvirt tells of an incoming state in a call of its own, before it calls for the start. What it told is kept in a file
// until then.

// expectFor bounds how long a note of an incoming state counts.
const expectFor = 10 * time.Minute

func (h Host) notePath(uuid string) string { return filepath.Join(h.State, uuid+".incoming") }

// expect notes how the state comes that the next start of the domain loads. Without the note the guest starts as well.
func (h Host) expect(uuid, incoming string) {
	if err := os.MkdirAll(h.State, 0o711); err == nil {
		_ = os.WriteFile(h.notePath(uuid), []byte(incoming), 0o600)
	}
}

// expected takes the note for the start that is on, "" without one.
func (h Host) expected(uuid string) string {
	if !host.IsUUID(uuid) {
		return ""
	}
	info, err := os.Stat(h.notePath(uuid))
	if err != nil {
		return ""
	}
	text, _ := os.ReadFile(h.notePath(uuid))
	_ = os.Remove(h.notePath(uuid))
	incoming := string(text)
	if time.Since(info.ModTime()) > expectFor || incoming != control.Migrated && incoming != control.Restored {
		return ""
	}
	return incoming
}

// release ends the shim of a domain that libvirt has let go. A shim ends with its QEMU; one whose QEMU never came
// has to be told.
func (h Host) release(uuid string) {
	_ = os.Remove(h.notePath(uuid))
	_, err := control.Ask(h.State, uuid, control.Request{Do: "quit"})
	if errors.Is(err, control.ErrGone) {
		_ = os.RemoveAll(filepath.Join(h.State, uuid))
	}
}
