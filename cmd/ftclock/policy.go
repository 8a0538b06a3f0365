package main

import (
	"fmt"
	"slices"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/host"
	"ftclock/policy"
	metadata "ftclock/xml-templates"
)

// policyCmd is about the host's policy.
type policyCmd struct {
	Check policyCheckCmd `cmd:"" help:"Check the files of the host's policy, and show which domain is under which."`
}

type policyCheckCmd struct {
	Dir string `arg:"" optional:"" default:"${policies}" help:"Directory of the files, to check some before they are put in place."`
}

func (policyCheckCmd) Help() string {
	return "A file names domains and gives them the clock element that their own metadata doesn't have. A domain's own metadata counts first, " +
		"then the first file in the order of their names. Exit code 1: a file is wrong, or it names no domain of this host, or two files name one domain."
}

func (c *policyCheckCmd) Run(p *program) error {
	files, err := policy.Read(c.Dir)
	if err != nil {
		return err
	}
	bad := false
	for _, f := range files {
		if f.Err != nil {
			p.Printf("bad  %s\n", host.ErrorLine(f.Err))
			bad = true
		} else {
			p.Printf("ok   %s\n", host.OneLine(f.Path))
		}
	}
	if len(files) == 0 {
		p.Printf("no files in %s\n", host.OneLine(c.Dir))
		return nil
	}
	named, problems, err := c.domains(p, files)
	if err != nil {
		return err
	}
	for _, f := range files {
		for _, s := range f.For {
			if !named[namer{f.Path, s}] {
				p.Printf("warn %s: %s names no domain of this host\n", host.OneLine(f.Path), host.OneLine(s.String()))
				bad = true
			}
		}
	}
	if bad || problems {
		return ui.ErrProblem
	}
	return nil
}

// namer is a selector of a file.
type namer struct {
	path string
	metadata.Selector
}

// domains prints under what each domain is, and gives which selectors name one.
func (c *policyCheckCmd) domains(p *program, files []policy.File) (named map[namer]bool, problems bool, err error) {
	h, err := hypervisor.Connect(p.uri())
	if err != nil {
		return nil, false, err
	}
	defer h.Close()
	named = map[namer]bool{}
	var lines []string
	err = h.Each(func(d *hypervisor.Domain) {
		line, bad, err := under(d, files, named)
		if err != nil {
			p.Warn("%s", ui.ErrorText(err))
			problems = true
			return
		}
		problems = problems || bad
		lines = append(lines, host.OneLine(d.Name)+": "+line)
	})
	slices.Sort(lines)
	for _, line := range lines {
		p.Printf("%s\n", line)
	}
	return named, problems, err
}

// under words under what a domain starts, and notes which selectors name it.
func under(d *hypervisor.Domain, files []policy.File, named map[namer]bool) (line string, bad bool, err error) {
	xml, err := d.Definition(0)
	if err != nil {
		return "", false, err
	}
	subject, err := metadata.ReadSubject(d.Name, d.UUID, xml)
	if err != nil {
		return "", false, fmt.Errorf("reading the definition of %s: %w", d.Name, err)
	}
	var by []string
	for _, f := range policy.Naming(files, subject) {
		for _, s := range f.For {
			named[namer{f.Path, s}] = true
		}
		by = append(by, host.OneLine(fmt.Sprintf("%s (%s)", f.Path, f.For[0])))
	}
	own, err := metadata.Parse(xml)
	switch {
	case err != nil:
		return "its own metadata, which is wrong: " + host.ErrorLine(err), true, nil
	case own.Policy != nil:
		return "its own metadata", false, nil
	case len(by) == 0:
		return "not managed", false, nil
	case len(by) > 1:
		return by[0] + "; " + by[1] + " names it, too, and doesn't count", true, nil
	}
	return by[0], false, nil
}
