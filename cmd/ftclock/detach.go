package main

import "ftclock/cmd/ftclock/internal/live"

type detachCmd struct {
	PID int `arg:"" name:"pid" help:"QEMU's process."`
}

func (c *detachCmd) Run(p *program) error {
	l, err := live.FindProcess(p.dirs, c.PID)
	if err != nil {
		return err
	}
	said, err := l.Leave(p.ctx)
	if err != nil {
		return err
	}
	p.Printf("%s: %s\n", l.Domain.Name, said)
	return nil
}
