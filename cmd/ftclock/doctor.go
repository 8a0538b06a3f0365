package main

import (
	"errors"

	"ftclock/cmd/ftclock/internal/doctor"
	"ftclock/cmd/ftclock/internal/ui"
)

type doctorCmd struct {
	NoProbe bool `help:"Start no probe domain."`
}

func (doctorCmd) Help() string {
	return "Prints a line for each thing that ftclock needs: ok, warn (something doesn't work, or works less well) or bad (ftclock " +
		"doesn't work), and below it how to fix it. Exit code 1: something is bad. " +
		"As root on a host with KVM it also starts a probe domain on each QEMU program that managed domains use: " + doctor.ProbeName +
		", without disk and network. It goes through libvirt, hook, shim and module, is paused three times, and is removed with its files."
}

func (c *doctorCmd) Run(p *program) error {
	anyBad := doctor.Print(p.UI, doctor.Examine(p.ctx, p.dirs, p.uri(), !c.NoProbe))
	if p.ctx.Err() != nil {
		return errors.New("interrupted; no probe domain is left")
	}
	if anyBad {
		return ui.ErrProblem
	}
	return nil
}
