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
	"ftclock/record"
	"ftclock/spawn"
)

// States that no shim tells of.
const (
	Off       control.State = "off"       // not running
	Disabled  control.State = "disabled"  // nothing of ours in it, and it was asked for by name
	Pending   control.State = "pending"   // enabled while it ran: the next start is corrected
	Unmanaged control.State = "unmanaged" // it runs with our metadata and without a shim
	Gone      control.State = "gone"      // its shim doesn't live any more
	Unknown   control.State = "unknown"   // its shim answers, but not with a status
)

// Entry is a domain as status shows it. Where there is no shim to tell the rest, only name, UUID, State and Why count.
type Entry struct {
	control.Status
	Mute bool // no shim said any of this
}

// Bad tells whether the domain is what exit code 1 is for. Why it isn't corrected doesn't count, so that report, verify and
// exporter say the same.
func (e Entry) Bad() bool {
	switch e.State {
	case control.Uncorrected, control.Unkept, control.Watching, Pending, Gone, Unmanaged, Forgotten, Unknown:
		return true
	}
	return e.Disagreements > 0
}

// NoState is what is to be done where a directory has no state of a shim.
const NoState = "if no shim is starting at this moment, remove that directory"

// Entries asks all shims and adds the domains that have none.
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

// Entry asks the shim that left info. One that doesn't answer is an entry as well.
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
	f, isKnown := known[info.UUID]
	switch {
	case !NoShim(err):
		e.State, e.Why = Unknown, ui.ErrorText(err)
	case known != nil && (!isKnown || f.ID == ""):
		e.State, e.Why = Off, "a shim that was killed left "+filepath.Join(at.Shims, info.UUID)
	default:
		e.State, e.Why = Gone, "its shim was killed or crashed"+at.andModule(info.Name, info.UUID)
	}
	return e, nil
}

// WithoutShim is a domain that no shim was started for, or that has ended with its shim.
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
			e.Why = "enabled while it ran: its next start is corrected, `ftclock enable --live " + ui.ShellWord(f.Name) + "` doesn't wait"
		}
	}
	return e
}

// andModule tells whether the module is there to follow the standing policy without a shim.
func (at Dirs) andModule(name, uuid string) string {
	fix := "; `ftclock enable --live " + ui.ShellWord(name) + "` gives it one"
	pid, err := spawn.FindQEMU("/", at.Libvirt, name, uuid)
	if err != nil {
		return fix
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

// NoShim tells whether an error of control.Ask means that nobody is there to ask.
func NoShim(err error) bool {
	return errors.Is(err, control.ErrGone) || errors.Is(err, os.ErrNotExist)
}

// Dirs are the directories of this host that tell how clocks are kept. Tests have their own.
type Dirs struct {
	Shims   string // a directory for each shim
	Records string // the records of all domains
	Libvirt string // a pid file and a status file for each running domain, of libvirt's QEMU driver (virDomainObjSave)
}

// HostDirs are where the programs of this host put them.
var HostDirs = Dirs{Shims: control.Dir, Records: record.Dir, Libvirt: "/run/libvirt/qemu"}

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
