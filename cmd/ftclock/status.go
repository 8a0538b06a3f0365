package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"libvirt.org/go/libvirt"

	"ftclock/attach"
	"ftclock/control"
	metadata "ftclock/xml-templates"
)

type statusCmd struct {
	Domain  string `arg:"" predictor:"domain" optional:"" help:"Name, UUID or id; all domains of ftclock's without it."`
	Format  string `enum:"table,json" default:"table" placeholder:"table|json" help:"table, or json for other programs."`
	Records int    `placeholder:"N" help:"Show the newest N pauses as well (at most 256)."`
}

func (statusCmd) Help() string {
	return "Exit code 1 says that the clock of a running domain in the list isn't corrected now, whatever the reason (also one whose guest has switched on no clock that ftclock keeps, that was " +
		"switched off with disable --live, enabled while it ran, or was managed until somebody wrote its definition anew), that a shim is gone, or that shim and module disagreed about " +
		"a pause; 3, that it couldn't be asked."
}

// States that no shim tells of.
const (
	off       control.State = "off"       // not running
	disabled  control.State = "disabled"  // nothing of ours in it, and it was asked for by name
	pending   control.State = "pending"   // enabled while it ran: the next start is corrected
	unmanaged control.State = "unmanaged" // it runs with our metadata and without a shim
	gone      control.State = "gone"      // its shim doesn't live any more
	unknown   control.State = "unknown"   // its shim answers, but not with a status
)

// entry is a domain as status shows it. Where there is no shim to tell the rest, only name, UUID, State and Why count.
type entry struct {
	control.Status
	mute bool // no shim said any of this
}

// bad tells whether the domain is what exit code 1 is for. Why it isn't corrected doesn't count, so that report, verify and
// exporter say the same.
func (e entry) bad() bool {
	switch e.State {
	case control.Uncorrected, control.Unkept, control.Watching, pending, gone, unmanaged, forgotten, unknown:
		return true
	}
	return e.Disagreements > 0
}

func (c *statusCmd) Run(p *program) error {
	if c.Records < 0 || c.Records > 256 {
		return hinted(fmt.Errorf("--records %d: the module keeps the newest 256", c.Records), "give a number from 0 to 256")
	}
	known, err := c.managed(p)
	if err != nil {
		return err
	}
	entries, err := readShims(p, known, max(c.Records, 1))
	if err != nil {
		return err
	}
	if c.Domain != "" {
		if entries, err = c.pick(entries, known); err != nil {
			return err
		}
	}
	if err := c.print(p, entries); err != nil {
		return err
	}
	if slices.ContainsFunc(entries, entry.bad) {
		return errProblem
	}
	return nil
}

func (c *statusCmd) print(p *program, entries []entry) error {
	if c.Format == "json" {
		return printJSON(p, entries, c.Records > 0)
	}
	switch {
	case len(entries) == 0:
		p.printf("no domain is enabled\n")
	case c.Domain != "":
		p.printDetails(entries[0])
	default:
		p.printTable(entries)
	}
	if c.Records > 0 {
		for _, e := range entries {
			if !e.mute {
				p.printf("\n")
				p.printRecords(e)
			}
		}
	}
	return nil
}

// found is what libvirt knows of a domain.
type found struct {
	name, uuid string
	id         string // empty: it isn't running
	defined    bool   // our metadata is in the definition of the next start
	running    bool   // our metadata is in what runs
	why        string // what is wrong with it
	forgotten  *entry // it was managed, and isn't any more
}

// managed lists libvirt's domains with our metadata, by UUID, and with them the one that was asked for, whatever it
// is. nil: libvirt can't be asked, which is no error, as the shims can.
func (c *statusCmd) managed(p *program) (map[string]found, error) {
	known, err := c.askLibvirt(p.uri, p.warn)
	var refused *unreachable
	if errors.As(err, &refused) {
		p.warn("%s; only domains with a shim are shown, `ftclock doctor` looks for the reason", sayError(refused.err))
		return nil, nil
	}
	return known, err
}

// unreachable is libvirt's own error at connecting.
type unreachable struct{ err error }

func (u *unreachable) Error() string { return u.err.Error() }
func (u *unreachable) Unwrap() error { return u.err }

// askLibvirt is managed for those who say themselves what it means that libvirt is unreachable.
func (c *statusCmd) askLibvirt(uri string, warn func(string, ...any)) (map[string]found, error) {
	h, err := connect(uri)
	if err != nil {
		var lv libvirt.Error
		if errors.As(err, &lv) {
			return nil, &unreachable{err}
		}
		return nil, err
	}
	defer h.close()
	if !h.isTest() {
		if err := checkLocal(h, "status"); err != nil {
			return nil, err
		}
	}
	all, err := h.ListAllDomains(0)
	if err != nil {
		return nil, fmt.Errorf("listing domains: %w", err)
	}
	known := make(map[string]found)
	lost, err := forgottenDomains()
	if err != nil {
		warn("%s; domains whose definitions were written anew aren't shown", sayError(err))
	}
	for i := range all {
		d, err := h.describe(&all[i])
		if errors.Is(err, libvirt.ERR_NO_DOMAIN) {
			continue // it went in the meantime
		}
		if err != nil {
			return nil, err
		}
		f := look(d)
		if i := slices.IndexFunc(lost, isForgotten(f.uuid)); i >= 0 && !f.defined && !f.running {
			f.forgotten = &lost[i]
		}
		if f.defined || f.running || f.forgotten != nil || c.means(f) || f.id != "" && hasDir(f.uuid) {
			known[f.uuid] = f
		}
		d.free()
	}
	return known, nil
}

// look asks for our metadata. A domain that vanishes meanwhile has none.
func look(d *domain) found {
	f := found{name: d.name, uuid: d.uuid}
	if d.active {
		if id, err := d.GetID(); err == nil {
			f.id = fmt.Sprint(id)
		}
		element, err := d.element(libvirt.DOMAIN_AFFECT_LIVE)
		f.running = err == nil && element != ""
	}
	if d.persistent {
		element, err := d.element(libvirt.DOMAIN_AFFECT_CONFIG)
		f.defined = err == nil && element != ""
		if _, err := metadata.ParseElement([]byte(element)); f.defined && err != nil {
			f.why = "it won't start: " + sayError(err)
		}
	}
	return f
}

func hasDir(uuid string) bool {
	_, err := os.Stat(shims + "/" + uuid)
	return err == nil
}

// means tells whether the command line names this domain.
func (c *statusCmd) means(f found) bool {
	return c.Domain != "" && (c.Domain == f.name || c.Domain == f.id || strings.EqualFold(c.Domain, f.uuid))
}

// noState is what is to be done where a directory has no state of a shim.
const noState = "if no shim is starting at this moment, remove that directory"

// readShims asks all shims and adds the domains that have none.
func readShims(p *program, known map[string]found, records int) ([]entry, error) {
	infos, err := control.List(shims)
	if errors.Is(err, os.ErrPermission) {
		return nil, hinted(err, "run it as root")
	}
	if err != nil {
		p.warn("%s; %s", err, noState)
	}
	entries := []entry{}
	seen := make(map[string]bool)
	for _, info := range infos {
		e, err := askShim(info, known, records)
		if err != nil {
			return nil, err
		}
		seen[info.UUID] = true
		entries = append(entries, e)
	}
	for uuid, f := range known {
		if !seen[uuid] {
			entries = append(entries, withoutShim(f))
		}
	}
	slices.SortFunc(entries, func(a, b entry) int {
		return strings.Compare(a.Name+"\x00"+a.UUID, b.Name+"\x00"+b.UUID)
	})
	return entries, nil
}

// askShim asks the shim that left info. One that doesn't answer is an entry as well.
func askShim(info control.Info, known map[string]found, records int) (entry, error) {
	answer, err := control.Ask(shims, info.UUID, control.Request{Do: "status", Records: records})
	if errors.Is(err, os.ErrPermission) {
		return entry{}, hinted(err, "run it as root")
	}
	if err == nil && answer.Status != nil {
		s := *answer.Status
		s.Name, s.UUID = info.Name, info.UUID
		return entry{Status: s}, nil
	}
	e := entry{mute: true, Status: control.Status{Name: info.Name, UUID: info.UUID, Mode: info.Mode}}
	f, isKnown := known[info.UUID]
	switch {
	case err == nil:
		e.State, e.Why = unknown, "its shim answers without a status"
	case !noShim(err):
		e.State, e.Why = unknown, sayError(err)
	case known != nil && (!isKnown || f.id == ""):
		e.State, e.Why = off, "a shim that was killed left "+shims+"/"+info.UUID
	default:
		e.State, e.Why = gone, "its shim was killed or crashed"+andModule(info.Name, info.UUID)
	}
	return e, nil
}

// withoutShim is a domain that no shim was started for, or that has ended with its shim.
func withoutShim(f found) entry {
	if f.forgotten != nil {
		return *f.forgotten
	}
	e := entry{mute: true, Status: control.Status{Name: f.name, UUID: f.uuid, Why: f.why}}
	switch {
	case !f.defined && !f.running:
		e.State = disabled
	case f.id == "":
		e.State = off
	case f.running:
		e.State = unmanaged
		e.Why = "it runs without a shim" + andModule(f.name, f.uuid)
	default:
		e.State = pending
		if f.why == "" {
			e.Why = "enabled while it ran: its next start is corrected, `ftclock enable --live " + shellWord(f.name) + "` doesn't wait"
		}
	}
	return e
}

// andModule tells whether the module is there to follow the standing policy without a shim.
func andModule(name, uuid string) string {
	fix := "; `ftclock enable --live " + shellWord(name) + "` gives it one"
	pid, err := attach.FindQEMU("/", pidDir, name, uuid)
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

// pick leaves the one domain that was asked for.
func (c *statusCmd) pick(entries []entry, known map[string]found) ([]entry, error) {
	for _, e := range entries {
		f, ok := known[e.UUID]
		if !ok {
			f = found{name: e.Name, uuid: e.UUID}
		}
		if c.means(f) {
			return []entry{e}, nil
		}
	}
	if known == nil {
		return nil, fmt.Errorf("no shim serves a domain %q", c.Domain)
	}
	return nil, noDomain(c.Domain)
}

// printJSON prints an array of control.Status; domains that no shim told of have name, uuid, state and why alone.
func printJSON(p *program, entries []entry, records bool) error {
	out := make([]any, 0, len(entries))
	for _, e := range entries {
		if e.mute {
			out = append(out, struct {
				Name  string        `json:"name"`
				UUID  string        `json:"uuid"`
				State control.State `json:"state"`
				Why   string        `json:"why,omitempty"`
			}{e.Name, e.UUID, e.State, e.Why})
			continue
		}
		if !records {
			e.Records = nil
		}
		out = append(out, e.Status)
	}
	encoder := json.NewEncoder(p.stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}
