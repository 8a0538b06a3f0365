package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/live"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

type enableCmd struct {
	Domain          string  `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Live            bool    `help:"Correct the running domain now, too. On this host only."`
	Preload         bool    `help:"Load the module by QEMU's dynamic linker (LD_PRELOAD), for hosts that forbid ptrace."`
	Reference       *string `enum:"raw,utc" placeholder:"raw|utc" help:"The host's clock that the guest follows: raw, as if it were never paused, or utc (raw)."`
	CheckpointLimit string  `placeholder:"TIME" help:"A longer pause is a suspend: 1ms to 15m (10s)."`
	Monitor         *string `enum:"relayed,direct" placeholder:"relayed|direct" help:"Whether libvirt's monitor connection goes through a relay or directly to QEMU, from the next start on (relayed)."`
	Required        *string `enum:"yes,no" placeholder:"yes|no" help:"Whether the domain may start only when its clock can be corrected (yes)."`
}

func (enableCmd) Help() string {
	return "For a domain that is enabled already, options that aren't given leave its policy unchanged."
}

func (c *enableCmd) Run(p *program) error {
	limit, err := parseLimit(c.CheckpointLimit)
	if err != nil {
		return err
	}
	d, err := hypervisor.Open(p.uri(), c.Domain)
	if err != nil {
		return err
	}
	defer d.Close()

	l, err := live.Find(p.dirs, d, c.Live, "enable")
	if err != nil {
		return err
	}
	t, err := readTexts(d)
	if err != nil {
		return err
	}
	policy := c.apply(t.policy(), limit)

	// The running QEMU comes first: if it can't be served, nothing has been changed.
	if l != nil {
		if err := l.Serve(p.ctx, policy); err != nil {
			return err
		}
	}
	changed := false
	if d.Persistent {
		if changed, err = c.define(d, t.defined, policy); err != nil {
			return err
		}
		p.Printf("%s\n", c.said(d, t.defined, changed))
		if hasNoClock(d) {
			p.Warn("the definition of %s switches kvmclock off, and Hyper-V's reference time isn't on: any other clock of its guest but the TSC loses every pause", d.Name)
		}
	}
	if l != nil {
		if err := d.SetElement(&policy, libvirt.DOMAIN_AFFECT_LIVE); err != nil {
			return err
		}
		return l.Report(p.UI)
	}
	if changed || d.Active {
		c.whenItTakesEffect(p, d)
	}
	return nil
}

// parseLimit parses a limit by the metadata's own parser, so that both accept the same; 0: none was given.
func parseLimit(text string) (metadata.Rule, error) {
	if text == "" {
		return metadata.Rule{}, nil
	}
	var escaped strings.Builder
	_ = xml.EscapeText(&escaped, []byte(text))
	policy, err := metadata.ParseElement([]byte(`<clock><on event="checkpoint" limit="` + escaped.String() + `"/></clock>`))
	var e *metadata.Error
	if errors.As(err, &e) {
		return metadata.Rule{}, ui.Hinted(fmt.Errorf("--checkpoint-limit: %s", e.Reason), "allowed: "+e.Allowed)
	}
	return policy.Checkpoint, err
}

// apply changes the policy as the options say.
func (c *enableCmd) apply(policy metadata.Policy, limit metadata.Rule) metadata.Policy {
	if c.Reference != nil {
		policy.Reference = map[string]metadata.Reference{"raw": metadata.Raw, "utc": metadata.UTC}[*c.Reference]
	}
	if limit.Limit != 0 {
		policy.Checkpoint.Limit = limit.Limit
	}
	if c.Monitor != nil {
		policy.Monitor = map[string]metadata.Monitor{"relayed": metadata.Relayed, "direct": metadata.Direct}[*c.Monitor]
	}
	if c.Required != nil {
		policy.Required = *c.Required == "yes"
	}
	return policy
}

// texts are a domain's definitions, as far as it has them.
type texts struct {
	defined metadata.Domain // the next start's; without a name if there is none
	running metadata.Domain // of the domain that runs
}

func readTexts(d *hypervisor.Domain) (texts, error) {
	var t texts
	var err error
	if d.Persistent {
		if t.defined, err = d.Parse(libvirt.DOMAIN_XML_INACTIVE); err != nil {
			return t, err
		}
	}
	if d.Active {
		if t.running, err = d.Parse(0); err != nil {
			return t, err
		}
	}
	for _, m := range []metadata.Domain{t.defined, t.running} {
		if m.Name != "" && m.Type != "kvm" && !d.Host.IsTest() {
			return t, ui.Hinted(fmt.Errorf("%s has the type %s: without KVM there is no kvmclock to keep right", d.Name, m.Type),
				fmt.Sprintf("`virsh edit %s`: <domain type='kvm'>", ui.ShellWord(d.Name)))
		}
	}
	return t, nil
}

// policy is the one that the options change: the domain's, or the default.
func (t texts) policy() metadata.Policy {
	switch {
	case t.defined.Policy != nil:
		return *t.defined.Policy
	case t.defined.Name == "" && t.running.Policy != nil:
		return *t.running.Policy
	}
	return metadata.Default()
}

// define changes the persistent definition, if it isn't as it should be already.
func (c *enableCmd) define(d *hypervisor.Domain, m metadata.Domain, policy metadata.Policy) (changed bool, err error) {
	if !c.Preload {
		if m.Policy != nil && *m.Policy == policy {
			return false, nil
		}
		return true, d.SetElement(&policy, libvirt.DOMAIN_AFFECT_CONFIG)
	}
	module, err := spawn.ModulePath()
	if err != nil {
		return false, err
	}
	old, err := d.Definition(libvirt.DOMAIN_XML_SECURE)
	if err != nil {
		return false, err
	}
	edited, err := metadata.Enable(old, metadata.EditOptions{Policy: policy, Preload: module})
	if err != nil {
		return false, fmt.Errorf("editing the definition of %s: %w", d.Name, err)
	}
	return d.Redefine(old, edited)
}

// said words what was done with the definition.
func (c *enableCmd) said(d *hypervisor.Domain, m metadata.Domain, changed bool) string {
	switch {
	case !changed:
		return d.Name + ": enabled already, with this policy"
	case m.Policy != nil:
		return d.Name + ": changed in its definition"
	}
	return d.Name + ": enabled in its definition"
}

// hasNoClock says whether the definition leaves the guest no clock that ftclock keeps.
func hasNoClock(d *hypervisor.Domain) bool {
	text, err := d.XML(libvirt.DOMAIN_XML_INACTIVE)
	if err != nil {
		return false
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(string(text)); err != nil || x.Clock == nil {
		return false
	}
	timer := func(name, present string) bool {
		return slices.ContainsFunc(x.Clock.Timer, func(t libvirtxml.DomainTimer) bool { return t.Name == name && t.Present == present })
	}
	return timer("kvmclock", "no") && !timer("hypervclock", "yes")
}

func (c *enableCmd) whenItTakesEffect(p *program, d *hypervisor.Domain) {
	p.Printf("%s: takes effect at the next start\n", d.Name)
	if saved, err := d.HasManagedSaveImage(0); err == nil && saved {
		p.Warn("%s will be restored from a saved image, which has the definition of then: shut it down or use "+
			"`virsh managedsave-remove` first", d.Name)
	}
	if d.Active && d.Host.Local() {
		p.Hint("`ftclock enable --live %s` serves the running domain as well", ui.ShellWord(d.Name))
	}
}
