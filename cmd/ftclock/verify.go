package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"ftclock/cmd/ftclock/internal/engine"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

type verifyCmd struct {
	Domain string `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Pauses int    `default:"5" placeholder:"N" help:"Number of pauses, of 20 ms each (2 to 200)."`
}

func (verifyCmd) Help() string {
	return "Pauses the domain a few times through libvirt, reads its kvmclock from the kernel at each stop, and prints in one line " +
		"whether that clock kept running during the pauses. Exit code 1: it didn't, or the guest has switched on neither kvmclock nor Hyper-V's reference " +
		"time, which is derived from it. Exit code 3: the guest's clock isn't known. Which of its clocks a guest reads can't be seen from outside."
}

func (c *verifyCmd) Run(p *program) error {
	if c.Pauses < 2 || c.Pauses > 200 {
		return ui.Hinted(fmt.Errorf("--pauses %d: want 2 to 200", c.Pauses), "the default, 5, is enough to see a clock that doesn't hold")
	}
	d, err := hypervisor.OpenRunning(p.uri(), c.Domain)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Host.CheckLocal("verify"); err != nil && !d.Host.IsTest() {
		return err
	}
	before, err := askToVerify(p.dirs, d)
	if err != nil {
		return err
	}
	if loaded := before.Pauses > 0; before.State == control.Uncorrected && !loaded || before.State == control.Starting {
		p.Printf("%s: its clock isn't corrected: %s\n", host.OneLine(d.Name), cmp.Or(host.OneLine(before.Why), "the module isn't loaded yet"))
		return ui.ErrProblem
	}
	switch err := engine.New(d).Sample(p.ctx, c.Pauses); {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted, %s is running", d.Name)
	case err != nil:
		return err
	}
	after, err := askToVerify(p.dirs, d)
	if err != nil {
		return err
	}
	v := engine.Judge(before, after)
	if v.Why != "" && !v.Fails {
		return fmt.Errorf("verifying the clock of %s: %s", d.Name, v.Why)
	}
	name := host.OneLine(d.Name)
	measured := v.Measured()
	kept, err := keptClock(after.GuestClock)
	switch {
	case v.Fails:
		p.Printf("%s: %s: %s: %s\n", name, p.Paint(ui.Red, "the clock doesn't hold"), measured, v.Why)
		return ui.ErrProblem
	case after.State == control.Unkept:
		p.Printf("%s: %s\n", name, p.Paint(ui.Red, status.UnkeptText))
		return ui.ErrProblem
	case err != nil:
		return ui.Hinted(fmt.Errorf("verifying the clock of %s: %w; kvmclock itself holds: %s", d.Name, err, measured),
			"verify it again once the guest has booted")
	}
	p.Printf("%s: %s: %s\n", name, p.Paint(ui.Green, kept+" holds"), measured)
	return nil
}

// keptClock names the clock that was verified; without one nothing can be said of the guest.
func keptClock(clock control.GuestClock) (string, error) {
	switch clock {
	case control.KVMClock:
		return "kvmclock", nil
	case control.HyperVPage, control.HyperVCounter:
		return "Hyper-V's reference time", nil
	}
	return "", fmt.Errorf("the guest's clock: %s", status.GuestClock(clock))
}

// askToVerify gets what the module recorded.
func askToVerify(at status.Dirs, d *hypervisor.Domain) (*control.Status, error) {
	s, err := at.Status(d.UUID, status.MaxRecords)
	switch {
	case status.NoShim(err):
		return nil, ui.Hinted(fmt.Errorf("no shim serves %s: its clock can't be read, and it loses every pause", d.Name),
			"`ftclock enable --live "+ui.ShellWord(d.Name)+"`")
	case err != nil:
		return nil, ui.Hinted(err, "run it as root")
	}
	return s, nil
}
