package main

import (
	"errors"
	"os"

	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/cmd/ftclock/internal/watch"
	"ftclock/control"
)

type watchCmd struct{}

func (watchCmd) Help() string {
	return "Refreshed once a second; the keys are shown at the bottom. Each column of the residual is a second, the newest at the right, and its height the " +
		"worst of that second's pauses. It needs no libvirt, only shows more with it, and must be root to ask the shims."
}

func (watchCmd) Run(p *program) error {
	if !ui.IsTerminal(p.Stdout) || os.Getenv("TERM") == "dumb" {
		return ui.Hinted(errors.New("watch draws on a terminal, and there is none"), "`ftclock status` prints the same once")
	}
	if _, err := control.List(p.dirs.Shims); errors.Is(err, os.ErrPermission) {
		return ui.Hinted(err, "run it as root")
	}
	return watch.Run(p.ctx, p.UI, p.stdin, p.dirs, p.uri)
}
