package main

import (
	"errors"
	"ftclock/cmd/ftclock/internal/doctor"
	"ftclock/cmd/ftclock/internal/ui"
)

type doctorCmd struct {
	NoProbe bool `help:"Only look: start no domain."`
}

func (doctorCmd) Help() string {
	return "A line for each thing that ftclock needs: ok, warn (something doesn't work, or not as well) or bad (ftclock " +
		"doesn't work), with what fixes it below. Exit code 1 says that something is bad. " +
		"As root on a host with KVM it proves the rest by doing: on each QEMU program that managed domains use, a domain named " + doctor.ProbeName + ", without disk " +
		"and network, goes through libvirt, hook, shim and module, is paused three times, and is removed with all that it leaves."
}

func (c *doctorCmd) Run(p *program) error {
	anyBad := doctor.Print(p.UI, doctor.Examine(p.ctx, p.dirs, p.uri, !c.NoProbe))
	if p.ctx.Err() != nil {
		return errors.New("interrupted; no probe domain is left")
	}
	if anyBad {
		return ui.ErrProblem
	}
	return nil
}
