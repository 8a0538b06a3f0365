package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/attach"
	"ftclock/control"
	machine "ftclock/host"
	"ftclock/spawn"
	"ftclock/unit"
	metadata "ftclock/xml-templates"
)

// pidDir is where libvirt's QEMU driver keeps a pid file a domain.
const pidDir = machine.LibvirtRun

// live is a running domain that can be served.
type live struct {
	domain *domain
	pid    int    // QEMU's
	module string // path of the module
	paused bool
	fresh  bool // the module came in only now
}

// findLive finds the QEMU of a running domain of this host and looks whether it can be served.
func findLive(h *host, d *domain, verb string) (*live, error) {
	if err := checkLocal(h, "--live"); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, hinted(errors.New("--live reaches into QEMU's process, which only root may do"), "run it as root")
	}
	if err := checkActive(d, verb); err != nil {
		return nil, err
	}
	module, err := spawn.ModulePath()
	if err != nil {
		return nil, err
	}
	pid, err := attach.FindQEMU("/", pidDir, d.name, d.uuid)
	if err != nil {
		return nil, err
	}
	state, _, err := d.GetState()
	if err != nil {
		return nil, fmt.Errorf("asking for the state of %s: %w", d.name, err)
	}
	return &live{domain: d, pid: pid, module: module, paused: state == libvirt.DOMAIN_PAUSED}, nil
}

// findTarget finds what a command works on: the running domain, or only its definition (nil).
func findTarget(h *host, d *domain, running bool, verb string) (*live, error) {
	if running {
		return findLive(h, d, verb)
	}
	return nil, needsDefinition(d, verb)
}

func checkActive(d *domain, verb string) error {
	if d.active {
		return nil
	}
	return hinted(fmt.Errorf("%s isn't running, so there is nothing to do --live", d.name),
		fmt.Sprintf("`ftclock %s %s` changes its definition, for the next start", verb, shellWord(d.name)))
}

// serve has the domain's shim follow policy: the one that is there, or a new one.
func (l *live) serve(p *program, policy metadata.Policy) error {
	clock := policy.XML()
	_, err := control.Ask(shims, l.domain.uuid, control.Request{Do: "policy", Clock: clock})
	switch {
	case err == nil:
		return nil
	case !noShim(err):
		return fmt.Errorf("giving the shim of %s its policy: %w", l.domain.name, err)
	}
	if _, loaded, err := attach.Loaded(l.pid); err == nil && !loaded {
		if err := attach.Check(l.pid, l.module); err != nil {
			return hinted(fmt.Errorf("serving the running %s: %w", l.domain.name, err),
				"`ftclock doctor` checks the host; without --live it is for the next start")
		}
		l.fresh = true
	}
	return l.start(p, clock)
}

// startTime is what a shim has to load the module and answer: QEMU's main thread is waited for.
const startTime = time.Minute

// start starts a shim beside libvirt and QEMU.
func (l *live) start(p *program, clock string) error {
	ctx, cancel := context.WithTimeout(p.ctx, startTime)
	defer cancel()
	err := unit.Start(ctx, spawn.Spec{
		UUID: l.domain.uuid, Name: l.domain.name, Clock: clock, PID: l.pid, Module: l.module,
	})
	if err != nil {
		return hinted(fmt.Errorf("starting a shim for %s: %w", l.domain.name, err), "`ftclock doctor` checks the host")
	}
	return nil
}

// noShim tells whether an error of control.Ask means that nobody is there to ask.
func noShim(err error) bool {
	return errors.Is(err, control.ErrGone) || errors.Is(err, os.ErrNotExist)
}

// report shows how the domain is served now.
func (l *live) report(p *program) error {
	answer, err := control.Ask(shims, l.domain.uuid, control.Request{Do: "status", Records: 1})
	if err != nil {
		return err
	}
	if answer.Status == nil {
		return fmt.Errorf("asking the shim of %s: it answers without a status", l.domain.name)
	}
	p.printf("%s: served from now on\n", l.domain.name)
	if l.paused && l.fresh { // the module didn't see the stop
		p.printf("%s: is paused, and this pause isn't caught up: the next one is\n", l.domain.name)
	}
	if s := answer.Status; s.Mode == control.Relay && direct(s) {
		p.printf("%s: its monitor is relayed until it stops\n", l.domain.name)
	}
	e := entry{Status: *answer.Status}
	p.printTable([]entry{e})
	if e.bad() {
		return errProblem
	}
	return nil
}

// served tells whether a shim answers for the domain.
func served(uuid string) bool {
	_, err := control.Ask(shims, uuid, control.Request{Do: "status"})
	return err == nil
}

// leave gives the domain's clock back to QEMU, and says what was there to be done.
func (l *live) leave(p *program) (said string, err error) {
	answer, err := control.Ask(shims, l.domain.uuid, control.Request{Do: "status"})
	mode := control.Watch
	switch {
	case err == nil && answer.Status != nil:
		mode = answer.Status.Mode
	case err == nil:
	case !noShim(err):
		return "", err
	default:
		if _, loaded, err := attach.Loaded(l.pid); err != nil {
			return "", err
		} else if !loaded {
			return "its clock was QEMU's already", nil
		}
		// The standing policy in the page serves on without a shim: a new one has to take it back.
		if err := l.start(p, ""); err != nil {
			return "", err
		}
	}
	if _, err = control.Ask(shims, l.domain.uuid, control.Request{Do: "policy"}); err != nil {
		return "", err
	}
	if mode == control.Relay {
		return "its clock is QEMU's again; the shim relays the monitor until the domain stops", nil
	}
	if _, err = control.Ask(shims, l.domain.uuid, control.Request{Do: "quit"}); err != nil {
		return "", err
	}
	return "its clock is QEMU's again, and the shim is gone", nil
}
