package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"ftclock/attach"
	"ftclock/cmd/ftclock/internal/live"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/host"
	"ftclock/node"
	"ftclock/policy"
	"ftclock/record"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

// nodeCmd serves the QEMUs of the host that the host's policy names, as attach serves one.
type nodeCmd struct{}

func (nodeCmd) Help() string {
	return "Finds every QEMU with KVM on this host, whoever started it and in whatever container it lives, and does what `ftclock attach` does for those " +
		"that a file of the host's policy names by the name or UUID on their command lines. Domains that libvirt's hook serves are left alone. It runs until " +
		"it is interrupted; what it serves stays served. ftclock-node.service runs it. node.md in share/doc/ftclock has more."
}

// lookEvery is the time between two looks at all processes where the kernel doesn't tell of those that start.
const lookEvery = 500 * time.Millisecond

func (nodeCmd) Run(p *program) error {
	if os.Geteuid() != 0 {
		return ui.Hinted(errors.New("reaching into QEMU's process is for root only"), "run it as root")
	}
	if _, err := spawn.ModulePath(); err != nil {
		return err
	}
	find := func(q node.QEMU) (*live.QEMU, error) { return live.FindProcess(p.dirs, q.PID) }
	n := &node.Node{
		Proc: "/proc", Policies: policy.Dir,
		Info: func(format string, args ...any) { p.Printf(format+"\n", args...) },
		Warn: p.Warn,
		Server: node.Server{
			Ready: attach.Ready,
			Left: func(q node.QEMU) (string, bool, error) {
				l, err := find(q)
				if err != nil {
					return "", false, err
				}
				return l.Left()
			},
			Serve: func(ctx context.Context, q node.QEMU, policy metadata.Policy, file string) error {
				l, err := find(q)
				if err != nil {
					return err
				}
				l.Policy = file
				return l.Serve(ctx, policy)
			},
		},
	}
	go expire(p)
	events, err := node.Connector()
	how := "the kernel tells of each program that starts"
	if err != nil {
		p.Warn("%s; CAP_NET_ADMIN and the host's pid and network namespaces are needed", host.ErrorLine(err))
		events, how = node.Every(lookEvery), fmt.Sprintf("all processes are looked at every %v", lookEvery)
	}
	p.Printf("serving the QEMUs of this host that the files in %s name: %s\n", policy.Dir, how)
	return n.Run(p.ctx, events)
}

// expire removes what is left of QEMUs that ended long ago, now and once a day.
func expire(p *program) {
	for {
		if err := record.Expire(p.dirs.Records, time.Now(), p.dirs.HasShim); err != nil {
			p.Warn("removing old records: %s", host.ErrorLine(err))
		}
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(24 * time.Hour):
		}
	}
}
