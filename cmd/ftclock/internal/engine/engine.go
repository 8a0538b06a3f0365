package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"libvirt.org/go/libvirt"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// Pausable is the part of a domain that the exercise uses.
type Pausable interface {
	Suspend() error
	Resume() error
	GetState() (libvirt.DomainState, int, error)
}

// Engine pauses and resumes.
type Engine struct {
	Domain  Pausable
	Resumer func() error // resumes by other means, when domain's connection is of no use any more
	Sums    Sums
}

// Sums are what is seen from here. A pause begins within the call that suspends and ends within the one that resumes:
// the guest was paused at least shortest and at most longest.
type Sums struct {
	Pauses            int
	Shortest, Longest time.Duration
	Took              time.Duration
	Late              int // pauses that came too late for the rate
}

// New makes an engine for a domain.
func New(d *hypervisor.Domain) *Engine { return &Engine{Domain: d.Domain, Resumer: d.ResumeAnew} }

// Drive makes count pauses of that length, one every period, and calls done after each. An interruption ends it early and is
// no error.
func (e *Engine) Drive(ctx context.Context, period, length time.Duration, count int, done func()) error {
	began := time.Now()
	next := began
	for range count {
		sleep(ctx, time.Until(next))
		if ctx.Err() != nil {
			break
		}
		if err := e.Pause(ctx, length); err != nil {
			return err
		}
		done()
		// A host that can't keep the rate up gets no burst afterwards.
		if next = next.Add(period); time.Since(next) > period {
			next = time.Now()
			e.Sums.Late++
		}
	}
	e.Sums.Took = time.Since(began)
	return nil
}

// Pause makes one pause. Whatever happens, it tries to leave the domain running.
func (e *Engine) Pause(ctx context.Context, length time.Duration) error {
	asked := time.Now()
	if err := e.Domain.Suspend(); err != nil {
		err = fmt.Errorf("suspending: %w", err)
		if state, _, unsure := e.Domain.GetState(); unsure == nil && state != libvirt.DOMAIN_PAUSED {
			return err
		}
		return errors.Join(err, e.resume())
	}
	paused := time.Now()
	resumed := false
	defer func() { // a panic must not leave the domain paused
		if !resumed {
			_ = e.resume()
		}
	}()
	sleep(ctx, length)
	resuming := time.Now()
	resumed = true
	if err := e.resume(); err != nil {
		return err
	}
	e.Sums.Pauses++
	e.Sums.Shortest += resuming.Sub(paused)
	e.Sums.Longest += time.Since(asked)
	return nil
}

// resume makes the domain run, or sees that it does. It doesn't end with the interruption that may have led to it.
func (e *Engine) resume() error {
	err := e.Domain.Resume()
	if err == nil {
		return nil
	}
	if state, _, asked := e.Domain.GetState(); asked == nil && state != libvirt.DOMAIN_PAUSED {
		return fmt.Errorf("resuming: somebody else resumed it, or the domain has ended: %w", err)
	}
	for range 5 {
		if again := e.Resumer(); again == nil {
			return fmt.Errorf("resuming needed a second connection: %w", err)
		}
		time.Sleep(time.Second)
	}
	return ui.Hinted(fmt.Errorf("resuming, THE DOMAIN MAY STILL BE PAUSED: %w", err), "`virsh resume` it")
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Sample makes count pauses that Judge can measure. Its error is the context's if that ends it early; the domain runs then.
func (e *Engine) Sample(ctx context.Context, count int) error {
	for range count {
		sleep(ctx, verifyRest)
		if ctx.Err() != nil {
			break
		}
		if err := e.Pause(ctx, verifyPause); err != nil {
			return err
		}
	}
	return ctx.Err()
}

const (
	verifyPause = 20 * time.Millisecond
	verifyRest  = 50 * time.Millisecond
	// verifyLimit is how far a clock that holds may be off. It leaves room for what a reading on a busy host is blurred by,
	// and is a tenth of what RTS 25 allows.
	verifyLimit = 10 * time.Microsecond
)

// Verdict is what the readings say.
type Verdict struct {
	Off    int64  // ns: how much further the guest's clock went than the host's, from the first stop to the last
	Pauses int    // between those
	Lost   uint64 // ns: how long they took
	Fails  bool
	Why    string // why it fails; or, if it doesn't, why nothing can be said
}

// Judge compares the kernel's readings of the guest's clock at each stop with CLOCK_MONOTONIC_RAW at the same moments. The
// pauses between the first stop and the last must not show. A guest that is steered to UTC is compared with where it
// is steered to, the anchor.
func Judge(before, after *control.Status) Verdict {
	var v Verdict
	var fresh []clockpage.Record
	for _, r := range after.Records {
		if r.Number > before.Pauses && r.StopRaw != 0 {
			fresh = append(fresh, r)
		}
	}
	if len(fresh) < 2 {
		v.Why = fmt.Sprintf("the module recorded %s: were they made by something other than libvirt, or doesn't this QEMU stop its clock?",
			ui.Count(uint64(len(fresh)), "pause"))
		return v
	}
	first, last := fresh[0], fresh[len(fresh)-1]
	v.Pauses = len(fresh) - 1
	for _, r := range fresh[:v.Pauses] {
		v.Lost += r.Took()
	}
	v.Off = int64(last.Saved-first.Saved) - int64(last.StopRaw-first.StopRaw)
	if policy, err := metadata.ParseElement([]byte(after.Clock)); err == nil && policy.Reference == metadata.UTC {
		v.Off = last.ResidualStop
	}
	if v.Off <= int64(verifyLimit) && v.Off >= -int64(verifyLimit) {
		return v
	}
	v.Fails, v.Why = true, "the reason isn't known, `ftclock status --records "+fmt.Sprint(len(fresh))+"` shows each pause"
	if after.State == control.Watching {
		v.Why = "it is only watched, `ftclock enable --live` corrects it"
		return v
	}
	for _, r := range fresh[:v.Pauses] {
		if !r.CaughtUp() {
			v.Why = r.Decision.String() + ": " + r.Reason.String()
		}
	}
	return v
}

// Measured is the verdict's figures in words.
func (v Verdict) Measured() string {
	return fmt.Sprintf("%s off after %s of %s in all", host.SignedNanoseconds(v.Off), ui.Count(uint64(v.Pauses), "pause"), host.Nanoseconds(v.Lost))
}
