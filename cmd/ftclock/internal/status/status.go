package status

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ftclock/attach"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

// States that don't come from a shim.
const (
	Off       control.State = "off"       // not running
	Disabled  control.State = "disabled"  // not managed, and named on the command line
	Pending   control.State = "pending"   // enabled while it ran: the next start is corrected
	Unmanaged control.State = "unmanaged" // it runs with ftclock's metadata and without a shim
	Gone      control.State = "gone"      // its shim was killed or crashed
	Unknown   control.State = "unknown"   // its shim doesn't answer, or not with a status
	// Unreachable is no domain's, but a whole host's, which can't be asked.
	Unreachable control.State = "unreachable"
)

// Entry is a domain as status shows it. Without a shim's answer only Name, UUID, State and Why are set.
type Entry struct {
	control.Status
	Mute bool   // without a shim's answer
	On   string // the host that says so
}

// Label names the domain, and the host where hosts are shown.
func (e Entry) Label(hosts bool) string {
	name := host.OneLine(e.Name)
	if hosts {
		return strings.TrimSpace(host.OneLine(e.On) + " " + name)
	}
	return name
}

// Bad tells whether the domain's clock isn't corrected, whatever the reason, or shim and module disagreed. Exit code 1, the report
// and the exporter mean the same.
func (e Entry) Bad() bool {
	switch e.State {
	case control.Uncorrected, control.Unkept, control.Watching, Pending, Gone, Unmanaged, Forgotten, Unknown, Unreachable:
		return true
	}
	return e.Disagreements > 0
}

// NoState is the hint for a shim's directory that has no readable state.
const NoState = "if no shim is starting at this moment, remove that directory"

// Entries asks all shims, and adds the known domains that have none. The error is a hinted one if this user may not ask.
func (at Dirs) Entries(known map[string]Known, records int, warn func(string, ...any)) ([]Entry, error) {
	infos, err := control.List(at.Shims)
	if errors.Is(err, os.ErrPermission) {
		return nil, ui.Hinted(err, "run it as root")
	}
	if err != nil {
		warn("%s; %s", err, NoState)
	}
	entries := []Entry{}
	seen := make(map[string]bool)
	for _, info := range infos {
		e, err := at.Entry(info, known, records)
		if err != nil {
			return nil, err
		}
		seen[info.UUID] = true
		entries = append(entries, e)
	}
	for uuid, f := range known {
		if !seen[uuid] {
			entries = append(entries, at.WithoutShim(f))
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int {
		return strings.Compare(a.Name+"\x00"+a.UUID, b.Name+"\x00"+b.UUID)
	})
	return entries, nil
}

// Entry asks the shim of info for its status. A shim that doesn't answer gives an entry, too.
func (at Dirs) Entry(info control.Info, known map[string]Known, records int) (Entry, error) {
	answer, err := at.Status(info.UUID, records)
	if errors.Is(err, os.ErrPermission) {
		return Entry{}, ui.Hinted(err, "run it as root")
	}
	if err == nil {
		s := *answer
		s.Name, s.UUID = info.Name, info.UUID
		return Entry{Status: s}, nil
	}
	e := Entry{Mute: true, Status: control.Status{Name: info.Name, UUID: info.UUID, Mode: info.Mode}}
	if NoShim(err) {
		e.State, e.Why = at.lost(info, known)
	} else {
		e.State, e.Why = Unknown, ui.ErrorText(err)
	}
	return e, nil
}

// WithoutShim is the entry of a known domain that has no shim.
func (at Dirs) WithoutShim(f Known) Entry {
	if f.forgotten != nil {
		return *f.forgotten
	}
	e := Entry{Mute: true, Status: control.Status{Name: f.Name, UUID: f.UUID, Why: f.why}}
	switch {
	case !f.Defined && !f.Running:
		e.State = Disabled
	case f.ID == "":
		e.State = Off
	case f.Running:
		e.State = Unmanaged
		e.Why = "it runs without a shim" + at.andModule(f.Name, f.UUID)
	default:
		e.State = Pending
		if f.why == "" {
			e.Why = "enabled while it ran: its next start is corrected, `ftclock enable --live " + ui.ShellWord(f.Name) + "` corrects it now"
		}
	}
	return e
}

// andModule words whether the module is in QEMU, where it follows the last policy also without a shim.
func (at Dirs) andModule(name, uuid string) string {
	fix := "; `" + correct(name, uuid) + "` gives it one"
	pid, _, ok := host.ProcessOf(uuid)
	if !ok {
		var err error
		if pid, err = attach.FindQEMU("/", at.Libvirt, name, uuid); err != nil {
			return fix
		}
	}
	_, loaded, err := attach.Loaded(pid)
	switch {
	case err != nil:
		return fix
	case loaded:
		return ", the module in QEMU follows the last policy" + fix
	}
	return ", QEMU has no module and the clock isn't corrected" + fix
}

// NoShim tells whether an error of Ask or Status means that the domain has no shim that lives.
func NoShim(err error) bool {
	return errors.Is(err, control.ErrGone) || errors.Is(err, os.ErrNotExist)
}

// Dirs are the directories from which the state of clocks is read. Tests have their own.
type Dirs struct {
	Shims   string // a directory for each shim
	Records string // the records of all domains
	Libvirt string // a pid file and a status file for each running domain, of libvirt's QEMU driver (virDomainObjSave)
}

// HostDirs are those of this host. Only tests of the whole program change them.
var HostDirs = Dirs{Shims: control.Dir, Records: host.DataDir, Libvirt: host.LibvirtRun}

// Ask sends a request to the shim of a domain; errors are control.Ask's.
func (at Dirs) Ask(uuid string, request control.Request) (control.Answer, error) {
	return control.Ask(at.Shims, uuid, request)
}

// Status asks the shim of a domain for its status, with so many of its newest records (at most MaxRecords).
func (at Dirs) Status(uuid string, records int) (*control.Status, error) {
	answer, err := at.Ask(uuid, control.Request{Do: "status", Records: records})
	if err == nil && answer.Status == nil {
		err = errors.New("its shim answers without a status")
	}
	return answer.Status, err
}

// MaxRecords is how many records a module keeps.
const MaxRecords = 256

// HasShim tells whether a shim was started for the domain and hasn't ended in good order.
func (at Dirs) HasShim(uuid string) bool {
	_, err := os.Stat(filepath.Join(at.Shims, uuid))
	return err == nil
}
