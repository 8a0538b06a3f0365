package main

import (
	"errors"
	"os"
	"slices"

	"ftclock/cmd/ftclock/internal/fleet"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/cmd/ftclock/internal/watch"
	"ftclock/control"
)

type watchCmd struct{}

func (watchCmd) Help() string {
	return "Refreshes once a second; the keys are shown at the bottom. Each column of the residual is one second, the newest at the right; its height is the " +
		"worst residual of that second's pauses. Run it as root. Without libvirt it shows the domains that have a shim. " +
		"Other hosts (-c qemu+ssh://root@HOST/system, any number of times) are asked by ssh every two seconds, without a password; a host that can't " +
		"be asked is a line of its own."
}

func (watchCmd) Run(p *program) error {
	if !ui.IsTerminal(p.Stdout) || os.Getenv("TERM") == "dumb" {
		return ui.Hinted(errors.New("watch draws on a terminal, and there is none"), "`ftclock status` prints the same once")
	}
	hosts, err := fleet.Hosts(p.uris)
	if err != nil {
		return err
	}
	here := slices.ContainsFunc(hosts, func(h fleet.Host) bool { return !h.Remote() })
	if _, err := control.List(p.dirs.Shims); here && errors.Is(err, os.ErrPermission) {
		return ui.Hinted(err, "run it as root")
	}
	return watch.Run(p.ctx, p.UI, p.stdin, p.dirs, hosts)
}
