package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"

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
		"--live or enabled while it ran, or when its definition was rewritten without ftclock's metadata. Exit code 3: the status couldn't be read."
}

func (c *statusCmd) Run(p *program) error {
	if c.Records < 0 || c.Records > status.MaxRecords {
		return ui.Hinted(fmt.Errorf("--records %d: the module keeps the newest %d", c.Records, status.MaxRecords), "give a number from 0 to 256")
	}
	known, err := c.managed(p)
	if err != nil {
		return err
	}
	entries, err := p.dirs.Entries(known, max(c.Records, 1), p.Warn)
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
	if slices.ContainsFunc(entries, status.Entry.Bad) {
		return ui.ErrProblem
	}
	return nil
}

func (c *statusCmd) print(p *program, entries []status.Entry) error {
	if c.Format == "json" {
		return printJSON(p, entries, c.Records > 0)
	}
	switch {
	case len(entries) == 0:
		p.Printf("no domain is enabled\n")
	case c.Domain != "":
		status.PrintDetails(p.UI, entries[0])
	default:
		status.PrintTable(p.UI, entries)
	}
	if c.Records > 0 {
		for _, e := range entries {
			if !e.Mute {
				p.Printf("\n")
				status.PrintRecords(p.UI, e)
			}
		}
	}
	return nil
}

// managed lists libvirt's managed domains by UUID, and with them the one that the command line names. It is nil, without an error,
// where libvirt doesn't answer: the shims still do.
func (c *statusCmd) managed(p *program) (map[string]status.Known, error) {
	h, err := hypervisor.Connect(p.uri)
	if errors.As(err, new(libvirt.Error)) {
		p.Warn("%s; only domains with a shim are shown, `ftclock doctor` finds the reason", ui.ErrorText(err))
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return p.dirs.Managed(h, c.means, p.Warn)
}

// means tells whether the command line names this domain.
func (c *statusCmd) means(f status.Known) bool {
	return c.Domain != "" && (c.Domain == f.Name || c.Domain == f.ID || strings.EqualFold(c.Domain, f.UUID))
}

// pick selects the one domain that the command line names.
func (c *statusCmd) pick(entries []status.Entry, known map[string]status.Known) ([]status.Entry, error) {
	for _, e := range entries {
		f, ok := known[e.UUID]
		if !ok {
			f = status.Known{Name: e.Name, UUID: e.UUID}
		}
		if c.means(f) {
			return []status.Entry{e}, nil
		}
	}
	if known == nil {
		return nil, fmt.Errorf("no shim serves a domain %q", c.Domain)
	}
	return nil, hypervisor.NoDomain(c.Domain)
}

// printJSON prints an array of control.Status; domains without an answer from a shim have only name, uuid, state and why.
func printJSON(p *program, entries []status.Entry, records bool) error {
	out := make([]any, 0, len(entries))
	for _, e := range entries {
		if e.Mute {
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
	encoder := json.NewEncoder(p.Stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(out)
}
