package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"

	"ftclock/spawn"
	"ftclock/xml-templates"
)

type enableCmd struct {
	Domain          string  `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Live            bool    `help:"Serve the running domain from now on, too. On this host only."`
	Preload         bool    `help:"Have QEMU's dynamic linker load the module (LD_PRELOAD), for hosts that forbid ptrace."`
	Reference       *string `enum:"raw,utc" placeholder:"raw|utc" help:"The host's clock that the guest follows: raw, as if it were never paused, or utc (raw)."`
	CheckpointLimit string  `placeholder:"TIME" help:"A longer pause is a suspend: 1ms to 15m (10s)."`
	Monitor         *string `enum:"relayed,direct" placeholder:"relayed|direct" help:"From its next start on, whether libvirt's monitor goes through a relay, or to QEMU directly (relayed)."`
	Required        *string `enum:"yes,no" placeholder:"yes|no" help:"Whether the domain may start only when its clock can be corrected (yes)."`
}

func (enableCmd) Help() string {
	return "Options that aren't given leave the policy of a domain that is enabled already as it is."
}

func (c *enableCmd) Run(p *program) error {
	limit, err := parseLimit(c.CheckpointLimit)
	if err != nil {
		return err
	}
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

	l, err := findTarget(h, d, c.Live, "enable")
	if err != nil {
		return err
	}
	t, err := readTexts(h, d)
	if err != nil {
		return err
	}
	policy := c.apply(t.policy(), limit)

	// The running QEMU first: if it can't be served nothing has been changed.
	if l != nil {
		if err := l.serve(p, policy); err != nil {
			return err
		}
	}
	changed := false
	if d.persistent {
		if changed, err = c.define(h, d, t.defined, policy); err != nil {
			return err
		}
		p.printf("%s\n", c.said(d, t.defined, changed))
		if d.hasNoClock() {
			p.warn("the definition of %s switches kvmclock off, and Hyper-V's reference time isn't on: any other clock of its guest but the TSC loses every pause", d.name)
		}
	}
	if l != nil {
		if err := d.setElement(&policy, libvirt.DOMAIN_AFFECT_LIVE); err != nil {
			return err
		}
		return l.report(p)
	}
	if changed || d.active {
		c.whenItTakesEffect(p, h, d)
	}
	return nil
}

// parseLimit reads a limit in the metadata's own language, so that there is one; 0: none was given.
func parseLimit(text string) (metadata.Rule, error) {
	if text == "" {
		return metadata.Rule{}, nil
	}
	var escaped strings.Builder
	_ = xml.EscapeText(&escaped, []byte(text))
	policy, err := metadata.ParseElement([]byte(`<clock><on event="checkpoint" limit="` + escaped.String() + `"/></clock>`))
	var e *metadata.Error
	if errors.As(err, &e) {
		return metadata.Rule{}, hinted(fmt.Errorf("--checkpoint-limit: %s", e.Reason), "allowed: "+e.Allowed)
	}
	return policy.Checkpoint, err
}

// apply changes what the options say.
func (c *enableCmd) apply(policy metadata.Policy, limit metadata.Rule) metadata.Policy {
	if c.Reference != nil {
		policy.Reference = metadata.Raw
		if *c.Reference == metadata.UTC.String() {
			policy.Reference = metadata.UTC
		}
	}
	if limit.Limit != 0 {
		policy.Checkpoint.Limit = limit.Limit
	}
	if c.Monitor != nil {
		policy.Monitor = metadata.Relayed
		if *c.Monitor == metadata.Direct.String() {
			policy.Monitor = metadata.Direct
		}
	}
	if c.Required != nil {
		policy.Required = *c.Required == "yes"
	}
	return policy
}

// needsDefinition refuses a transient domain where only a definition can be changed.
func needsDefinition(d *domain, verb string) error {
	if d.persistent {
		return nil
	}
	return hinted(fmt.Errorf("%s is transient: it has no definition that a next start would use", d.name),
		fmt.Sprintf("`ftclock %s --live %s` works on the running domain", verb, shellWord(d.name)))
}

// texts are a domain's definitions as far as they are there.
type texts struct {
	defined metadata.Domain // the next start's; without a name if there is none
	running metadata.Domain // of the domain that runs
}

func readTexts(h *host, d *domain) (texts, error) {
	var t texts
	var err error
	if d.persistent {
		if t.defined, err = d.parse(libvirt.DOMAIN_XML_INACTIVE); err != nil {
			return t, err
		}
	}
	if d.active {
		if t.running, err = d.parse(0); err != nil {
			return t, err
		}
	}
	for _, m := range []metadata.Domain{t.defined, t.running} {
		if m.Name != "" && m.Type != "kvm" && !h.isTest() {
			return t, hinted(fmt.Errorf("%s has the type %s: without KVM there is no kvmclock to keep right", d.name, m.Type),
				fmt.Sprintf("`virsh edit %s`: <domain type='kvm'>", shellWord(d.name)))
		}
	}
	return t, nil
}

// policy is the one to start from: what the operator has, or the default.
func (t texts) policy() metadata.Policy {
	switch {
	case t.defined.Policy != nil:
		return *t.defined.Policy
	case t.defined.Name == "" && t.running.Policy != nil:
		return *t.running.Policy
	}
	return metadata.Default()
}

// parse reads one of a domain's definitions.
func (d *domain) parse(flags libvirt.DomainXMLFlags) (metadata.Domain, error) {
	xml, err := d.xml(flags)
	if err != nil {
		return metadata.Domain{}, err
	}
	m, err := metadata.Parse(xml)
	if err != nil {
		return m, hinted(fmt.Errorf("reading the definition of %s: %w", d.name, err), fmt.Sprintf(
			"fix it with `virsh edit %s`, or take it out with `ftclock disable %[1]s`", shellWord(d.name)))
	}
	return m, nil
}

// define changes the persistent definition, if it isn't as it should be already.
func (c *enableCmd) define(h *host, d *domain, m metadata.Domain, policy metadata.Policy) (changed bool, err error) {
	if !c.Preload {
		if m.Policy != nil && *m.Policy == policy {
			return false, nil
		}
		return true, d.setElement(&policy, libvirt.DOMAIN_AFFECT_CONFIG)
	}
	module, err := spawn.ModulePath()
	if err != nil {
		return false, err
	}
	old, err := d.definition(libvirt.DOMAIN_XML_SECURE)
	if err != nil {
		return false, err
	}
	edited, err := metadata.Enable(old, metadata.EditOptions{Policy: policy, Preload: module})
	if err != nil {
		return false, fmt.Errorf("editing the definition of %s: %w", d.name, err)
	}
	return h.redefine(d, old, edited)
}

// redefine hands an edited definition to libvirt, if it was changed at all.
func (h *host) redefine(d *domain, old, edited []byte) (changed bool, err error) {
	if bytes.Equal(old, edited) {
		return false, nil
	}
	defined, err := h.DomainDefineXML(string(edited))
	if err != nil {
		return false, fmt.Errorf("defining %s: %w", d.name, err)
	}
	_ = defined.Free()
	return true, nil
}

// said tells what was done with the definition.
func (c *enableCmd) said(d *domain, m metadata.Domain, changed bool) string {
	switch {
	case !changed:
		return d.name + ": enabled already, with this policy"
	case m.Policy != nil:
		return d.name + ": changed in its definition"
	}
	return d.name + ": enabled in its definition"
}

// hasNoClock says whether the definition leaves the guest no clock that ftclock keeps.
func (d *domain) hasNoClock() bool {
	text, err := d.xml(libvirt.DOMAIN_XML_INACTIVE)
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

func (c *enableCmd) whenItTakesEffect(p *program, h *host, d *domain) {
	p.printf("%s: takes effect at the next start\n", d.name)
	if saved, err := d.HasManagedSaveImage(0); err == nil && saved {
		p.warn("%s will be restored from a saved image, which has the definition of then: shut it down or use "+
			"`virsh managedsave-remove` first", d.name)
	}
	if d.active && isLocal(h.uri) {
		p.hint("`ftclock enable --live %s` serves the running domain as well", shellWord(d.name))
	}
}

// shellWord quotes a word for a shell where it needs it.
func shellWord(s string) string {
	plain := strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.,:+@/", r))
	}) < 0
	if plain && s != "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
