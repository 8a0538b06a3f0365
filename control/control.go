package control

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sort"
	"syscall"
	"time"

	"ftclock/clockpage"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// Dir is where shims keep their state, a directory a domain. A reboot empties it, as it does libvirt's own.
const Dir = "/run/ftclock"

// Names in libvirt's directory of a domain. The second is what the hook renames libvirt's socket to; it is no longer than the
// first, since the whole path may be as long as a socket's address can be.
const (
	MonitorSocket = "monitor.sock"
	QEMUSocket    = "monitor.qemu"
)

// How a QEMU that was started to load a state came by it.
const (
	Migrated = "migrated"
	Restored = "restored"
)

// Names in a domain's directory in Dir.
const (
	SocketName = "control.sock"
	InfoName   = "shim.json"
)

// maxMessage bounds a request or an answer, in bytes.
const maxMessage = 1 << 20

// ErrGone is what Ask gives for a domain whose shim left its directory behind without living any more.
var ErrGone = errors.New("its shim doesn't answer: it was killed or crashed")

// Info is what a shim writes into its directory when it starts, for those who can't ask it.
type Info struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
	Mode Mode   `json:"mode"`
}

// Request asks a shim for something.
type Request struct {
	Do      string `json:"do"`                // "status", "policy", "anchor", "published", "import" or "quit"
	Records int    `json:"records,omitempty"` // status: so many of the newest records, at most 256
	// Clock is the domain's clock element as XML (policy). Empty: watch only, leave the clock to QEMU.
	Clock string `json:"clock,omitempty"`
	// Anchor is what the guest's clock is carried on from when a state is loaded (import).
	Anchor *metadata.Anchor `json:"anchor,omitempty"`
}

// Answer is a shim's answer. Error, when there is one, is a single line.
type Answer struct {
	Error  string  `json:"error,omitempty"`
	Status *Status `json:"status,omitempty"`
	// Anchor is what the guest's clock reads, or would if it weren't paused (anchor).
	Anchor *metadata.Anchor `json:"anchor,omitempty"`
}

// Mode is how a shim serves its domain.
type Mode string

// The values of Mode.
const (
	Relay Mode = "relay" // between libvirt and QEMU since the domain's start
	Watch Mode = "watch" // beside them: the module is loaded, the monitor isn't carried
)

// State says in one word how a domain's clock is kept.
type State string

// The values of State.
const (
	Starting    State = "starting"    // QEMU isn't there yet, or the module isn't loaded yet
	Correcting  State = "correcting"  // the module follows the policy
	Unkept      State = "unkept"      // it does, but the guest has switched on no clock that ftclock keeps
	Watching    State = "watching"    // the module records, QEMU's own values go through
	Uncorrected State = "uncorrected" // no module, or it is in doubt at each pause: Why says the reason
)

// GuestClock says which of the clocks that ftclock keeps the guest has switched on. Whether it reads that one can't be seen.
type GuestClock string

// The values of GuestClock.
const (
	KVMClock       GuestClock = "kvmclock"
	HyperVPage     GuestClock = "hyperv-page"    // Hyper-V's reference TSC page
	HyperVCounter  GuestClock = "hyperv-counter" // Hyper-V's reference counter, but not the page
	NoClockYet     GuestClock = "none-yet"       // none of them: it hasn't run for long
	NoClock        GuestClock = "none"           // none of them, for UnkeptAfter
	ClockNotSeen   GuestClock = "not-seen"       // nobody looked yet: the module does at a pause
	ClockNotKnown  GuestClock = "not-known"      // the kernel didn't say
	ClockOldModule GuestClock = "old-module"     // the module is of a version that doesn't look
)

// UnkeptAfter is how long a guest may run without a clock that ftclock keeps, before that counts: firmware and boot loaders need none.
const UnkeptAfter = 3 * time.Minute

// Status is what a shim knows of its domain. All times and clocks are nanoseconds.
type Status struct {
	Name    string    `json:"name"`
	UUID    string    `json:"uuid"`
	Version string    `json:"version"`
	Mode    Mode      `json:"mode"`
	State   State     `json:"state"`
	Why     string    `json:"why,omitempty"`
	Method  string    `json:"method,omitempty"` // "ptrace" or "preload": how the module came in
	QEMU    int       `json:"qemu,omitempty"`   // pid
	Shim    int       `json:"shim"`             // pid of the worker
	Keeper  int       `json:"keeper"`           // pid
	Workers uint64    `json:"workers"`          // how many workers there were; each but the first took over from one that died
	Since   time.Time `json:"since"`
	Clock   string    `json:"clock"` // the policy's XML; empty: watch only
	// Policy is the file of the host's policy from which the domain started; empty where its metadata had one.
	Policy string `json:"policy,omitempty"`
	// GuestClock is empty while the module isn't loaded.
	GuestClock GuestClock `json:"guest_clock,omitempty"`

	clockpage.Counts
	Anchor clockpage.Anchor `json:"anchor"`
	// Published is when somebody last said that the anchor in the domain's metadata is as new as it can be; zero: nobody did to this worker.
	Published time.Time `json:"published,omitzero"`
	// Follow is nil until the guest has a reference, Host until a pause of a guest that follows UTC.
	Follow *clockpage.Follow `json:"follow,omitempty"`
	Host   *clockpage.Host   `json:"host,omitempty"`

	// Disagreements counts the pauses whose lost interval the module measured outside the bounds that the shim
	// saw from the monitor; the last one is told in words.
	Disagreements    uint64 `json:"disagreements"`
	LastDisagreement string `json:"last_disagreement,omitempty"`
	// Warnings are the newest, at most 16.
	Warnings []string `json:"warnings,omitempty"`

	Records []clockpage.Record `json:"records,omitempty"` // oldest first
	// Kept tells of the record on disk; nil where none was begun.
	Kept *RecordStatus `json:"kept,omitempty"`
}

// RecordStatus is what a shim knows of the record that it keeps on disk.
type RecordStatus struct {
	Path string `json:"path"`
	Run  string `json:"run"` // names the life of the QEMU process
	// Pauses and Missed are those of this run that the record tells of, and those that it knows by their number alone.
	Pauses uint64 `json:"pauses"`
	Missed uint64 `json:"missed"`
	// Problem says why the record can't be written now.
	Problem string `json:"problem,omitempty"`
	// Host is of the last minute with a pause, or of now.
	Host HostClock `json:"host_clock"`
}

// HostClock is the state of the host's CLOCK_REALTIME as the kernel has it from whoever disciplines it (adjtimex(2)), over some
// time. Times are ns.
type HostClock struct {
	// Samples is how often the kernel was asked. 0: nothing is known.
	Samples uint64 `json:"samples"`
	// Synchronised says that it was each time.
	Synchronised bool `json:"synchronised"`
	// Offset is what was still to be corrected, where it was largest.
	Offset int64 `json:"offset_ns"`
	// EstimatedError and MaximumError are the largest. The kernel lets the latter grow by 500 ppm while nobody tells it better.
	EstimatedError int64 `json:"estimated_error_ns"`
	MaximumError   int64 `json:"maximum_error_ns"`
}

// ReadHostClock asks the kernel once.
func ReadHostClock() (HostClock, error) {
	c, err := host.ReadClock()
	if err != nil {
		return HostClock{}, err
	}
	return HostClock{1, c.Synchronised, c.Offset, c.EstimatedError, c.MaximumError}, nil
}

// Merge is the worse of both.
func (h HostClock) Merge(o HostClock) HostClock {
	switch {
	case h.Samples == 0:
		return o
	case o.Samples == 0:
		return h
	}
	if max(o.Offset, -o.Offset) > max(h.Offset, -h.Offset) {
		h.Offset = o.Offset
	}
	h.Samples += o.Samples
	h.Synchronised = h.Synchronised && o.Synchronised
	h.EstimatedError = max(h.EstimatedError, o.EstimatedError)
	h.MaximumError = max(h.MaximumError, o.MaximumError)
	return h
}

// List reads the Infos of all shims below dir, running or not, sorted by name. An Info that can't be read is left out
// and told in the error, which comes with the rest.
func List(dir string) ([]Info, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing shims: %w", err)
	}
	var infos []Info
	var bad error
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		info, err := ReadInfo(filepath.Join(dir, entry.Name()))
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		infos = append(infos, info)
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].Name < infos[j].Name })
	return infos, bad
}

// ReadInfo reads the Info in a shim's directory.
func ReadInfo(dir string) (Info, error) {
	var info Info
	text, err := os.ReadFile(filepath.Join(dir, InfoName))
	if err != nil {
		return info, fmt.Errorf("reading a shim's state: %w", err)
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return info, fmt.Errorf("reading a shim's state in %s: %w", dir, err)
	}
	return info, nil
}

// NobodyListens says whether a connection to a unix socket failed because nobody listens there. Where this process lacks descriptors
// or memory, or too many wait there to be accepted, somebody may.
func NobodyListens(err error) bool {
	for _, may := range []error{syscall.EAGAIN, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS} {
		if errors.Is(err, may) {
			return false
		}
	}
	return err != nil
}

// Ask sends one request to the shim of the domain uuid below dir. The error is ErrGone where a directory is left but
// no shim, and wraps os.ErrNotExist where there is neither.
func Ask(dir, uuid string, request Request) (Answer, error) {
	var answer Answer
	path := filepath.Join(dir, uuid, SocketName)
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		switch _, lost := os.Stat(filepath.Join(dir, uuid)); {
		case errors.Is(err, os.ErrPermission):
		case lost != nil:
			err = os.ErrNotExist
		case NobodyListens(err):
			err = ErrGone
		}
		return answer, fmt.Errorf("asking the shim of %s: %w", uuid, err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if err := Send(conn, request); err != nil {
		return answer, fmt.Errorf("asking the shim of %s: %w", uuid, err)
	}
	if err := Receive(conn, &answer); err != nil {
		return answer, fmt.Errorf("hearing the shim of %s: %w", uuid, err)
	}
	if answer.Error != "" {
		return answer, errors.New(answer.Error)
	}
	return answer, nil
}

// Send writes one message.
func Send(w io.Writer, message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	_, err = w.Write(append(text, '\n'))
	return err
}

// Receive reads one message into *message; longer than 1 MiB is an error.
func Receive(r io.Reader, message any) error {
	line, err := bufio.NewReader(io.LimitReader(r, maxMessage)).ReadBytes('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, message)
}
