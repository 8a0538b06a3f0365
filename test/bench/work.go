package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"ftclock/test/guest"
	"ftclock/test/linuxguest"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"
)

// work counts the loops that guests complete, with and without checkpoints and ftclock.
func (b *bench) work() (string, error) {
	var subjects [2]*subject
	for i, k := range [][2]string{{"work-stock", ""}, {"work-kept", managed}} {
		s, err := b.startSubject(k[0], k[1])
		if err != nil {
			return "", err
		}
		defer s.end()
		if err := neverRest(s); err != nil {
			return "", err
		}
		subjects[i] = s
	}
	out := measure.NewTable("loops in a second", "checkpoints a second", "stock", "ftclock", "ftclock over stock, pairwise", "stock, of none")
	if err := b.workOf(out, "the freestanding guest", subjects, [2]*guest.Clock{subjects[0].clock, subjects[1].clock}); err != nil {
		return "", err
	}
	if err := b.linuxWork(out); err != nil {
		var why unavailable
		if !errors.As(err, &why) {
			return "", err
		}
		fmt.Fprintf(out, "\nNot measured in this run, a Linux guest: %s.\n", why)
	}
	out.WriteString("\nA loop is a reading of the clock, published, and a rest of 10,000 cycles. Both guests take turns of some seconds, " +
		"the other one paused; pauses are 2 ms through libvirt. What ftclock changes is in the noise of a busy machine: see the spread of the ratios over the rates.\n")
	return out.String(), nil
}

// neverRest has a freestanding guest work all the time.
func neverRest(s *subject) error {
	pid, err := s.PID()
	if err != nil {
		return err
	}
	hands, err := guest.OpenHands(pid)
	if err != nil {
		return err
	}
	hands.NeverRest()
	return hands.Close()
}

// workOf measures a pair of paused guests, the second of which ftclock keeps.
func (b *bench) workOf(t *measure.Table, name string, subjects [2]*subject, clocks [2]*guest.Clock) error {
	// A pause before the first look takes the anchor.
	var before [2]int64
	for i, s := range subjects {
		for range 2 {
			var err error
			if before[i], err = behind(s, clocks[i]); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	var none float64
	var pauses int
	for _, rate := range []int{0, 10, 40} {
		var speed [2][]float64
		for range pick(b, 5, 1) {
			for i, s := range subjects {
				v, made, err := workFor(s, clocks[i], rate, pick(b, 2*time.Second, 500*time.Millisecond))
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				speed[i] = append(speed[i], v)
				if i == 0 {
					pauses += made
				}
			}
		}
		ratios := make([]float64, len(speed[0]))
		for i := range ratios {
			ratios[i] = speed[1][i] / speed[0][i]
		}
		if rate == 0 {
			none = measure.Median(speed[0])
		}
		t.Row(name, fmt.Sprint(rate), fmt.Sprintf("%.0f", measure.Median(speed[0])), fmt.Sprintf("%.0f", measure.Median(speed[1])),
			fmt.Sprintf("× %.3f (%.3f to %.3f)", measure.Median(ratios), measure.Quantile(ratios, 0.25), measure.Quantile(ratios, 0.75)),
			fmt.Sprintf("%.0f %%", 100*measure.Median(speed[0])/none))
	}
	least := time.Duration(pauses) * pauseLength
	for i, s := range subjects {
		after, err := behind(s, clocks[i])
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		lost := after - before[i]
		if i == 0 {
			b.check(lost >= int64(least), "at work, %s lost only %s of %v: the measuring is broken", s.name, measure.Drift(lost), least)
		} else {
			b.check(!guest.Off(lost), "at work, %s is left %s", s.name, measure.Drift(lost))
		}
	}
	return nil
}

// behind has a paused guest run for a look at its clock, and gives its offset in ns.
func behind(s *subject, c *guest.Clock) (int64, error) {
	if err := s.Resume(); err != nil {
		return 0, err
	}
	if _, err := c.Steady(); err != nil {
		return 0, err
	}
	offset, _, err := c.Offset(300 * time.Millisecond)
	return offset, errors.Join(err, s.Suspend())
}

// workFor has a paused guest run for that long with so many checkpoints a second, and gives its loops in a second, and how
// many checkpoints it made.
func workFor(s *subject, c *guest.Clock, rate int, length time.Duration) (speed float64, made int, err error) {
	if err := s.Resume(); err != nil {
		return 0, 0, err
	}
	before, err := c.Steady()
	if err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	for n := 1; ; n++ {
		if rate == 0 {
			time.Sleep(length)
			break
		}
		time.Sleep(time.Until(begin.Add(time.Duration(n) * time.Second / time.Duration(rate))))
		if time.Since(begin) >= length {
			break
		}
		if err := s.Pause(pauseLength); err != nil {
			return 0, 0, err
		}
		made++
	}
	after, err := c.Steady()
	if err != nil {
		return 0, 0, err
	}
	took := time.Since(begin)
	return float64(after.Loops-before.Loops) / took.Seconds(), made, s.Suspend()
}

// linuxWork does the same with a real Linux.
func (b *bench) linuxWork(t *measure.Table) error {
	if missing := linuxguest.Missing(); len(missing) > 0 {
		return unavailable(strings.Join(missing, "; "))
	}
	if b.quick {
		return unavailable("the quick form leaves it out")
	}
	image, err := linuxguest.Build(privatelibvirt.Dir)
	if err != nil {
		return err
	}
	var subjects [2]*subject
	var clocks [2]*guest.Clock
	for i, k := range [][2]string{{"linux-stock", ""}, {"linux-kept", managed}} {
		d, err := privatelibvirt.Define(b.conn, privatelibvirt.Manage(linuxguest.XML(k[0], image, 1), k[1]))
		if err != nil {
			return err
		}
		s := &subject{name: k[0], Domain: d}
		defer s.end()
		if err := d.Create(); err != nil {
			return err
		}
		pid, err := d.PID()
		if err != nil {
			return err
		}
		c, err := linuxguest.Open(pid, 5*time.Minute)
		if err != nil {
			return err
		}
		defer c.Close()
		subjects[i], clocks[i] = s, c.Monotonic
		if err := s.Suspend(); err != nil {
			return err
		}
	}
	return b.workOf(t, "Linux", subjects, clocks)
}
