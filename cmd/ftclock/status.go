package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"ftclock/cmd/ftclock/internal/fleet"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"

	"golang.org/x/sync/errgroup"
	"libvirt.org/go/libvirt"
)

type statusCmd struct {
	Domain  string `arg:"" predictor:"domain" optional:"" help:"Name, UUID or id. Default: all domains that are managed."`
	Format  string `enum:"table,json" default:"table" placeholder:"table|json" help:"table, or json for other programs."`
	Records int    `placeholder:"N" help:"Show the newest N pauses as well (at most 256)."`
}

func (statusCmd) Help() string {
	return "Exit code 1: the clock of a running domain in the list isn't corrected now, a shim is gone, or shim and module disagreed about a " +
		"pause. The reason doesn't matter: a domain also counts when its guest has switched on no clock that ftclock keeps, when it was disabled with " +
		"--live or enabled while it ran, or when its definition was rewritten without ftclock's metadata. Exit code 3: the status of a host " +
		"couldn't be read; the others are shown. Another host (-c qemu+ssh://root@HOST/system) is asked by ssh, without a password: " +
		"ftclock must be installed there. Several -c are asked at the same time, and each has 30 seconds to answer."
}

func (c *statusCmd) Run(p *program) error {
	if c.Records < 0 || c.Records > status.MaxRecords {
		return ui.Hinted(fmt.Errorf("--records %d: the module keeps the newest %d", c.Records, status.MaxRecords), "give a number from 0 to 256")
	}
	hosts, err := fleet.Hosts(p.uris)
	if err != nil {
		return err
	}
	answers := c.ask(p, hosts)
	many := len(hosts) > 1 || hosts[0].Remote()
	var entries []status.Entry
	for _, a := range answers {
		for _, warning := range a.Warnings {
			if many {
				warning = a.host.Name + ": " + warning
			}
			p.Warn("%s", warning)
		}
		entries = append(entries, a.Entries...)
	}
	failed := slices.DeleteFunc(answers, func(a hostAnswer) bool { return a.err == nil })
	if len(hosts) == 1 && len(failed) == 1 {
		return failed[0].err
	}
	if c.Domain != "" && len(entries) == 0 && len(failed) == 0 {
		return ui.Hinted(fmt.Errorf("no domain %q is managed on any of these hosts", c.Domain), "`ftclock status` without a domain shows those that are")
	}
	if len(entries) > 0 || len(failed) < len(hosts) {
		if err := c.print(p, entries, many); err != nil {
			return err
		}
	}
	for _, a := range failed {
		p.Tell("error", a.err)
	}
	switch {
	case len(failed) > 0:
		return ui.ErrTold
	case slices.ContainsFunc(entries, status.Entry.Bad):
		return ui.ErrProblem
	}
	return nil
}

// hostAnswer is what a host says, or why it says nothing.
type hostAnswer struct {
	host fleet.Host
	fleet.Answer
	err error
}

// maxHosts bounds how many hosts are asked at the same time.
const maxHosts = 64

// ask asks the hosts side by side. The answers are in the hosts' order.
func (c *statusCmd) ask(p *program, hosts []fleet.Host) []hostAnswer {
	answers := make([]hostAnswer, len(hosts))
	var group errgroup.Group
	group.SetLimit(maxHosts)
	for i, h := range hosts {
		group.Go(func() error {
			answers[i] = c.askOne(p, h, len(hosts) > 1)
			return nil
		})
	}
	_ = group.Wait()
	return answers
}

// askOne asks a host. One among others needn't have the domain that the command line names.
func (c *statusCmd) askOne(p *program, h fleet.Host, among bool) (a hostAnswer) {
	a.host = h
	if !h.Remote() {
		a.Entries, a.err = c.here(p, h, among, func(format string, args ...any) {
			a.Warnings = append(a.Warnings, fmt.Sprintf(format, args...))
		})
		return a
	}
	a.Answer, a.err = h.Ask(p.ctx, max(c.Records, 1))
	if c.Domain == "" || a.err != nil {
		return a
	}
	a.Entries = slices.DeleteFunc(a.Entries, func(e status.Entry) bool { return !c.means(status.Known{Name: e.Name, UUID: e.UUID}) })
	if len(a.Entries) == 0 && !among {
		a.err = ui.Hinted(fmt.Errorf("no domain %q is managed on %s", c.Domain, h.Name), "give the name or the UUID of one that `ftclock status` shows there")
	}
	return a
}

// here reads this host's domains.
func (c *statusCmd) here(p *program, h fleet.Host, among bool, warn func(string, ...any)) ([]status.Entry, error) {
	known, err := c.managed(p, h.URI, libvirtWait, warn)
	if err != nil {
		return nil, err
	}
	entries, err := p.dirs.Entries(known, max(c.Records, 1), warn)
	if err != nil {
		return nil, err
	}
	if c.Domain != "" {
		entries, err = c.pick(entries, known)
		if among && err != nil {
			return nil, nil
		}
	}
	for i := range entries {
		entries[i].On = h.Name
	}
	return entries, err
}

func (c *statusCmd) print(p *program, entries []status.Entry, hosts bool) error {
	if c.Format == "json" {
		return printJSON(p, entries, c.Records > 0)
	}
	switch {
	case len(entries) == 0:
		p.Printf("no domain is enabled\n")
	case c.Domain != "":
		for i, e := range entries {
			if i > 0 {
				p.Printf("\n")
			}
			status.PrintDetails(p.UI, e, hosts)
		}
	default:
		status.PrintTable(p.UI, entries, hosts)
	}
	if c.Records > 0 {
		for _, e := range entries {
			if !e.Mute {
				p.Printf("\n")
				status.PrintRecords(p.UI, e, hosts)
			}
		}
	}
	return nil
}

// libvirtWait bounds the wait for this host's libvirt. Another host that asks for this status gives it 30 seconds.
const libvirtWait = 10 * time.Second

// managed lists libvirt's managed domains by UUID, and with them the one that the command line names. It is nil, without an error,
// where libvirt doesn't answer: the shims still do.
func (c *statusCmd) managed(p *program, uri string, within time.Duration, warn func(string, ...any)) (map[string]status.Known, error) {
	type answer struct {
		known    map[string]status.Known
		err      error
		warnings []string
	}
	answers := make(chan answer, 1)
	go func() { // libvirt's client waits for a daemon that hangs as long as that does
		var a answer
		a.known, a.err = c.askLibvirt(p, uri, func(format string, args ...any) { a.warnings = append(a.warnings, fmt.Sprintf(format, args...)) })
		answers <- a
	}()
	select {
	case a := <-answers:
		for _, w := range a.warnings {
			warn("%s", w)
		}
		return a.known, a.err
	case <-time.After(within):
		warn("libvirt doesn't answer within %v; only domains with a shim are shown; fix: restart libvirtd (or virtqemud), which leaves domains alone", within)
		return nil, nil
	}
}

func (c *statusCmd) askLibvirt(p *program, uri string, warn func(string, ...any)) (map[string]status.Known, error) {
	h, err := hypervisor.Connect(uri)
	if errors.As(err, new(libvirt.Error)) {
		warn("%s; only domains with a shim are shown, `ftclock doctor` finds the reason", ui.ErrorText(err))
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return p.dirs.Managed(h, c.means, warn)
}

// means tells whether the command line names this domain.
func (c *statusCmd) means(f status.Known) bool {
	return c.Domain != "" && (c.Domain == f.Name || c.Domain == f.ID || strings.EqualFold(c.Domain, f.UUID))
}

// pick selects the one domain that the command line names: by its UUID or id, which nobody gives himself, before its name.
func (c *statusCmd) pick(entries []status.Entry, known map[string]status.Known) ([]status.Entry, error) {
	var named []status.Entry
	for _, e := range entries {
		f, ok := known[e.UUID]
		if !ok {
			f = status.Known{Name: e.Name, UUID: e.UUID}
		}
		switch {
		case strings.EqualFold(c.Domain, f.UUID) || f.ID != "" && c.Domain == f.ID:
			return []status.Entry{e}, nil
		case c.means(f):
			named = append(named, e)
		}
	}
	if len(named) > 0 {
		return named[:1], nil
	}
	if known == nil {
		return nil, fmt.Errorf("no shim serves a domain %q", c.Domain)
	}
	return nil, hypervisor.NoDomain(c.Domain)
}

// printJSON prints an array of control.Status, each with the host that says so; domains without an answer from a shim have only name,
// uuid, state and why.
func printJSON(p *program, entries []status.Entry, records bool) error {
	out := make([]any, 0, len(entries))
	for _, e := range entries {
		if e.Mute {
			out = append(out, struct {
				Hostname string        `json:"hostname"`
				Name     string        `json:"name"`
				UUID     string        `json:"uuid"`
				State    control.State `json:"state"`
				Why      string        `json:"why,omitempty"`
			}{e.On, e.Name, e.UUID, e.State, e.Why})
			continue
		}
		if !records {
			e.Records = nil
		}
		out = append(out, struct {
			Hostname string `json:"hostname"`
			control.Status
		}{e.On, e.Status})
	}
	encoder := json.NewEncoder(p.Stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}
