package main

import (
	"fmt"

	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/live"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/disk"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

type disableCmd struct {
	Domain string `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Live   bool   `help:"Stop correcting the running domain now, too. On this host only."`
}

func (disableCmd) Help() string {
	return "The guest's clock isn't set back: it stays as it is, and later pauses aren't corrected."
}

func (c *disableCmd) Run(p *program) error {
	d, err := hypervisor.Open(p.uri(), c.Domain)
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := live.Find(p.dirs, d, c.Live, "disable")
	if err != nil {
		return err
	}

	if d.Persistent {
		changed, err := undefine(d)
		if err != nil {
			return err
		}
		if changed {
			p.Printf("%s: disabled in its definition\n", d.Name)
		} else {
			p.Printf("%s: no ftclock metadata in its definition\n", d.Name)
		}
	}
	if d.Host.Local() {
		dir, uuid := p.dirs.Records, d.UUID
		if err := disk.InTime(p.ctx, dir, func() error { return record.SetManaged(dir, uuid, false) }); err != nil {
			p.Warn("%s; `ftclock status` will miss the domain", ui.ErrorText(err))
		}
	}
	if l != nil {
		return c.now(p, l)
	}
	if d.Active && d.Host.Local() && live.Served(p.dirs, d.UUID) {
		p.Printf("%s: the running domain is corrected until it stops\n", d.Name)
		p.Hint("`ftclock disable --live %s` stops that now", ui.ShellWord(d.Name))
	}
	return nil
}

// undefine removes all of ftclock from the persistent definition.
func undefine(d *hypervisor.Domain) (changed bool, err error) {
	old, err := d.Definition(0)
	if err != nil {
		return false, err
	}
	// The editor also removes an element that can't be parsed.
	if m, err := metadata.Parse(old); err == nil && !m.Preload {
		if m.Policy == nil {
			return false, nil
		}
		return true, d.SetElement(nil, libvirt.DOMAIN_AFFECT_CONFIG)
	}
	if old, err = d.Definition(libvirt.DOMAIN_XML_SECURE); err != nil {
		return false, err
	}
	edited, err := metadata.Disable(old)
	if err != nil {
		return false, fmt.Errorf("editing the definition of %s: %w", d.Name, err)
	}
	return d.Redefine(old, edited)
}

// now ends the correction of the running domain.
func (c *disableCmd) now(p *program, l *live.QEMU) error {
	d := l.Domain
	element, err := d.Element(libvirt.DOMAIN_AFFECT_LIVE)
	if err != nil {
		return err
	}
	if element != "" {
		if err := d.SetElement(nil, libvirt.DOMAIN_AFFECT_LIVE); err != nil {
			return err
		}
	}
	said, err := l.Leave(p.ctx)
	if err != nil {
		return err
	}
	p.Printf("%s: %s\n", d.Name, said)
	return nil
}
