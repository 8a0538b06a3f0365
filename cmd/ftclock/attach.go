package main

import (
	"fmt"

	"ftclock/cmd/ftclock/internal/live"
	metadata "ftclock/xml-templates"
)

// attachCmd serves a QEMU that libvirt didn't start: an engine's own, or the secondary of COLO.
type attachCmd struct {
	PID             int     `arg:"" name:"pid" help:"QEMU's process."`
	Clock           string  `placeholder:"XML" help:"The whole policy, a clock element as in a domain's metadata; the options below change it."`
	Reference       *string `enum:"raw,utc" placeholder:"raw|utc" help:"The host's clock that the guest follows (raw)."`
	CheckpointLimit string  `placeholder:"TIME" help:"A longer pause is a suspend: 1ms to 15m (10s)."`
}

func (attachCmd) Help() string {
	return "For a libvirt domain use `ftclock enable DOMAIN --live`. There is no monitor to watch, so one policy applies to every pause."
}

func (c *attachCmd) Run(p *program) error {
	limit, err := parseLimit(c.CheckpointLimit)
	if err != nil {
		return err
	}
	policy := metadata.Default()
	if c.Clock != "" {
		if policy, err = metadata.ParseElement([]byte(c.Clock)); err != nil {
			return fmt.Errorf("--clock: %w", err)
		}
	}
	l, err := live.FindProcess(p.dirs, c.PID)
	if err != nil {
		return err
	}
	options := enableCmd{Reference: c.Reference}
	if err := l.Serve(p.ctx, options.apply(policy, limit)); err != nil {
		return err
	}
	return l.Report(p.UI)
}
