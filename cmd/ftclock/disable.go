package main

import (
	"fmt"

	"libvirt.org/go/libvirt"

	"ftclock/disk"
	"ftclock/record"
	"ftclock/xml-templates"
)

type disableCmd struct {
	Domain string `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Live   bool   `help:"Leave the clock of the running domain alone from now on, too. On this host only."`
}

func (disableCmd) Help() string {
	return "The guest's clock isn't set back: it stays as it is, and the pauses to come are QEMU's own affair."
}

func (c *disableCmd) Run(p *program) error {
	h, err := connect(p.uri)
	if err != nil {
		return err
	}
	defer h.close()
	d, err := h.find(c.Domain)
	if err != nil {
		return err
	}
	defer d.free()
	l, err := findTarget(h, d, c.Live, "disable")
	if err != nil {
		return err
	}

	if d.persistent {
		changed, err := undefine(h, d)
		if err != nil {
			return err
		}
		if changed {
			p.printf("%s: disabled in its definition\n", d.name)
		} else {
			p.printf("%s: nothing of ftclock in its definition\n", d.name)
		}
	}
	if isLocal(h.uri) {
		dir, uuid := records, d.uuid
		if err := disk.InTime(p.ctx, dir, func() error { return record.SetManaged(dir, uuid, false) }); err != nil {
			p.warn("%s; `ftclock status` will miss the domain", sayError(err))
		}
	}
	if l != nil {
		return c.now(p, l)
	}
	if d.active && isLocal(h.uri) && served(d.uuid) {
		p.printf("%s: the running domain is served until it stops\n", d.name)
		p.hint("`ftclock disable --live %s` ends that now", shellWord(d.name))
	}
	return nil
}

// undefine takes all of ours out of the persistent definition.
func undefine(h *host, d *domain) (changed bool, err error) {
	old, err := d.definition(0)
	if err != nil {
		return false, err
	}
	// A definition with an element of ours that can't be understood is for the editor as well.
	if m, err := metadata.Parse(old); err == nil && !m.Preload {
		if m.Policy == nil {
			return false, nil
		}
		return true, d.setElement(nil, libvirt.DOMAIN_AFFECT_CONFIG)
	}
	if old, err = d.definition(libvirt.DOMAIN_XML_SECURE); err != nil {
		return false, err
	}
	edited, err := metadata.Disable(old)
	if err != nil {
		return false, fmt.Errorf("editing the definition of %s: %w", d.name, err)
	}
	return h.redefine(d, old, edited)
}

// now ends the correction of the running domain.
func (c *disableCmd) now(p *program, l *live) error {
	d := l.domain
	element, err := d.element(libvirt.DOMAIN_AFFECT_LIVE)
	if err != nil {
		return err
	}
	if element != "" {
		if err := d.setElement(nil, libvirt.DOMAIN_AFFECT_LIVE); err != nil {
			return err
		}
	}
	said, err := l.leave(p)
	if err != nil {
		return err
	}
	p.printf("%s: %s\n", d.name, said)
	return nil
}
