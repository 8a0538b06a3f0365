package main

import (
	"fmt"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/control"
	"ftclock/xml-templates"
)

type verifyCmd struct {
	Domain string `arg:"" predictor:"domain" help:"Name, UUID or id."`
	Pauses int    `default:"5" placeholder:"N" help:"So many pauses of 20 ms (2 to 200)."`
}

func (verifyCmd) Help() string {
	return "Pauses the domain a few times through libvirt, reads its kvmclock back from the kernel at each stop, and says in one " +
		"line whether it went on like the host's while the guest was paused. Exit code 1 says that it didn't, or that the guest has switched on " +
		"neither it nor Hyper-V's reference time, which follows it; 3, that the guest's clock isn't known. Which of its clocks a guest reads can't be seen."
}

const (
	verifyPause = 20 * time.Millisecond
	verifyRest  = 50 * time.Millisecond
	// verifyLimit is how far a clock that holds may be off. It leaves room for what a reading on a busy host is blurred by,
	// and is a tenth of what RTS 25 allows.
	verifyLimit = 10 * time.Microsecond
)

func (c *verifyCmd) Run(p *program) error {
	if c.Pauses < 2 || c.Pauses > 200 {
		return hinted(fmt.Errorf("--pauses %d: want 2 to 200", c.Pauses), "the default, 5, is enough to see a clock that doesn't hold")
	}
	h, err := connect(p.uri)
	if err != nil {
		return err
	}
	defer h.close()
	if !h.isTest() {
		if err := checkLocal(h, "verify"); err != nil {
			return err
		}
	}
	d, err := h.findRunning(c.Domain)
	if err != nil {
		return err
	}
	defer d.free()
	before, err := askToVerify(d)
	if err != nil {
		return err
	}
	if before.State == control.Uncorrected || before.State == control.Starting {
		p.printf("%s: its clock isn't corrected: %s\n", oneLine(d.name), or(oneLine(before.Why), "the module isn't loaded yet"))
		return errProblem
	}
	e := &engine{domain: d.Domain, resumer: func() error { return resumeAgain(p.uri, d.uuid) }}
	for range c.Pauses {
		if err := e.pause(p.ctx, verifyPause); err != nil {
			return err
		}
		sleep(p.ctx, verifyRest)
		if p.ctx.Err() != nil {
			return fmt.Errorf("interrupted, %s is running", d.name)
		}
	}
	after, err := askToVerify(d)
	if err != nil {
		return err
	}
	v := judge(before, after)
	if v.why != "" && !v.fails {
		return fmt.Errorf("verifying the clock of %s: %s", d.name, v.why)
	}
	name := oneLine(d.name)
	measured := fmt.Sprintf("%s off after %s of %s in all", signedNS(v.off), count(uint64(v.pauses), "pause"), sayNS(v.lost))
	kept, err := keptClock(after.GuestClock)
	switch {
	case v.fails:
		p.printf("%s: %s: %s: %s\n", name, p.paint(red, "the clock doesn't hold"), measured, v.why)
		return errProblem
	case after.State == control.Unkept:
		p.printf("%s: %s\n", name, p.paint(red, unkept))
		return errProblem
	case err != nil:
		return hinted(fmt.Errorf("verifying the clock of %s: %w; kvmclock itself holds: %s", d.name, err, measured),
			"once the guest's system has booted, verify it again")
	}
	p.printf("%s: %s: %s\n", name, p.paint(green, kept+" holds"), measured)
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
	return "", fmt.Errorf("the guest's clock: %s", sayGuestClock(clock))
}

func or(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// askToVerify gets what the module recorded.
func askToVerify(d *domain) (*control.Status, error) {
	answer, err := control.Ask(shims, d.uuid, control.Request{Do: "status", Records: 256})
	switch {
	case noShim(err):
		return nil, hinted(fmt.Errorf("no shim serves %s: nobody can read its clock back, and QEMU takes each pause from it", d.name),
			"`ftclock enable --live "+shellWord(d.name)+"`")
	case err != nil:
		return nil, hinted(err, "run it as root")
	case answer.Status == nil:
		return nil, fmt.Errorf("asking the shim of %s: it answers without a status", d.name)
	}
	return answer.Status, nil
}

// verdict is what the readings say.
type verdict struct {
	off    int64  // ns: how much further the guest's clock went than the host's, from the first stop to the last
	pauses int    // between those
	lost   uint64 // ns: how long they took
	fails  bool
	why    string // why it fails; or, if it doesn't, why nothing can be said
}

// judge compares the kernel's readings of the guest's clock at each stop with CLOCK_MONOTONIC_RAW at the same moments. The
// pauses between the first stop and the last must not show. A guest that is steered to UTC is compared with where it
// is steered to, the anchor.
func judge(before, after *control.Status) verdict {
	var v verdict
	var fresh []control.Record
	for _, r := range after.Records {
		if r.Number > before.Pauses && r.StopRaw != 0 {
			fresh = append(fresh, r)
		}
	}
	if len(fresh) < 2 {
		v.why = fmt.Sprintf("the module recorded %s: are they made by another engine than libvirt, or doesn't this QEMU stop its clock?",
			count(uint64(len(fresh)), "pause"))
		return v
	}
	first, last := fresh[0], fresh[len(fresh)-1]
	v.pauses = len(fresh) - 1
	for _, r := range fresh[:v.pauses] {
		v.lost += uint64(max(r.Lost, 0))
	}
	v.off = int64(last.Saved-first.Saved) - int64(last.StopRaw-first.StopRaw)
	if policy, err := metadata.ParseElement([]byte(after.Clock)); err == nil && policy.Reference == metadata.UTC {
		v.off = last.ResidualStop
	}
	if v.off <= int64(verifyLimit) && v.off >= -int64(verifyLimit) {
		return v
	}
	v.fails, v.why = true, "the reason isn't known, `ftclock status --records "+fmt.Sprint(len(fresh))+"` shows each pause"
	if after.State == control.Watching {
		v.why = "it is only watched, `ftclock enable --live` has it corrected"
		return v
	}
	for _, r := range fresh[:v.pauses] {
		if r.Decision == "held" || r.Decision == "passed" {
			v.why = oneLine(r.Decision + ": " + r.Reason)
		}
	}
	return v
}

// findRunning is find for a domain that must be running.
func (h *host) findRunning(name string) (*domain, error) {
	d, err := h.find(name)
	if err != nil {
		return nil, err
	}
	state, _, err := d.GetState()
	switch {
	case err != nil:
		err = fmt.Errorf("asking for the state of %s: %w", d.name, err)
	case state != libvirt.DOMAIN_RUNNING && state != libvirt.DOMAIN_BLOCKED:
		err = hinted(fmt.Errorf("%s isn't running", d.name), fmt.Sprintf("`virsh start %s`, or `virsh resume %[1]s` if it is paused", shellWord(d.name)))
	}
	if err != nil {
		d.free()
		return nil, err
	}
	return d, nil
}
