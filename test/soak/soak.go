package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"ftclock/control"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
)

const (
	// batch is how many pauses there are between two looks at the module's records, of which it keeps 256.
	batch = 200
	// glance is how long the drift is read for along the way, look at the beginning and the end.
	glance = 300 * time.Millisecond
	look   = 2 * time.Second
	// looksMore is how often it is read again at most where it seems to be large.
	looksMore = 10
	// glances is how often, in all.
	glances = 200
)

// point is the guest's drift after so many pauses, in ns; positive is behind.
type point struct {
	pauses int
	drift  int64
}

// plan is what to do.
type plan struct {
	pauses  int
	longest time.Duration // of a pause, and of the time between two; either is drawn at random
	end     time.Duration // of it all, however many pauses there were
}

// result is what was found. Times are ns.
type result struct {
	plan      plan
	points    []point
	residuals []int64 // of each pause: the kernel's clock less the anchor's, when QEMU read it at the stop
	lost      int64   // what the pauses lasted for in all
	longCost  int64   // the longest time in the module at a cont
	status    control.Status
	backsteps uint64
	took      time.Duration
}

// soak does what p says.
func soak(p plan, progress io.Writer) (_ *result, err error) {
	elf, err := guest.Copy(privatelibvirt.Dir)
	if err != nil {
		return nil, err
	}
	qemu, monitor, err := privatelibvirt.BareQEMU("soak", elf)
	if err != nil {
		return nil, err
	}
	defer func() {
		_ = monitor.Close()
		_ = qemu.Process.Kill()
		_ = qemu.Wait()
	}()
	clock, err := guest.Open(qemu.Process.Pid)
	if err != nil {
		return nil, err
	}
	defer clock.Close()
	if err := clock.WaitMoving(2 * time.Minute); err != nil {
		return nil, err
	}
	pid := strconv.Itoa(qemu.Process.Pid)
	if out, err := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", "attach", pid).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ftclock attach: %w: %s", err, out)
	}
	uuid, err := shimOf(pid)
	if err != nil {
		return nil, err
	}

	r := &result{plan: p}
	var first int64
	glanceAt := func(pauses int, d time.Duration) error {
		offset, _, err := clock.Offset(d)
		if err != nil {
			return err
		}
		// A look is never too small, but on a busy machine it may be too large.
		for range looksMore {
			if len(r.points) > 0 && offset-first < noise {
				break
			}
			again, _, err := clock.Offset(d)
			if err != nil {
				return err
			}
			offset = min(offset, again)
		}
		if len(r.points) == 0 {
			first = offset
		}
		r.points = append(r.points, point{pauses, offset - first})
		return nil
	}
	// One pause before it all takes the anchor.
	if err := monitor.Pause(time.Millisecond); err != nil {
		return nil, err
	}
	if err := glanceAt(0, look); err != nil {
		return nil, err
	}
	begin := time.Now()
	var seen uint64 = 1
	random := rand.New(rand.NewPCG(1, 2))
	every := max(p.pauses/glances/batch*batch, batch)
	done := 0
	for done < p.pauses && time.Since(begin) < p.end {
		for range batch {
			if err := monitor.Pause(time.Duration(random.Int64N(int64(p.longest)))); err != nil {
				return nil, err
			}
			time.Sleep(time.Duration(random.Int64N(int64(p.longest))))
		}
		done += batch
		if seen, err = r.read(uuid, seen); err != nil {
			return nil, err
		}
		if done%every == 0 {
			if err := glanceAt(done, glance); err != nil {
				return nil, err
			}
			fmt.Fprintf(progress, "%d pauses, drift %d ns, %v\n", done, r.points[len(r.points)-1].drift, time.Since(begin).Round(time.Second))
		}
	}
	r.took = time.Since(begin)
	if err := glanceAt(done, look); err != nil {
		return nil, err
	}
	r.backsteps, _, err = clock.Backsteps()
	return r, err
}

// shimOf finds the shim of an attached QEMU.
func shimOf(pid string) (uuid string, err error) {
	infos, err := control.List(control.Dir)
	for _, i := range infos {
		if strings.HasPrefix(i.UUID, "pid-"+pid+"-") {
			return i.UUID, nil
		}
	}
	return "", errors.Join(errors.New("no shim serves the guest"), err)
}

// read takes the records after the pause number seen, of which none may be missing, and gives the newest number.
func (r *result) read(uuid string, seen uint64) (uint64, error) {
	answer, err := control.Ask(control.Dir, uuid, control.Request{Do: "status", Records: 256})
	if err != nil {
		return seen, err
	}
	r.status = *answer.Status
	r.status.Records = nil
	for _, record := range answer.Status.Records {
		if record.Number <= seen {
			continue
		}
		if record.Number != seen+1 {
			return seen, fmt.Errorf("the record of pause %d is missing", seen+1)
		}
		seen = record.Number
		if !record.CaughtUp() {
			return seen, fmt.Errorf("pause %d was %s: %s", record.Number, record.Decision, record.Reason)
		}
		r.residuals = append(r.residuals, record.ResidualStop)
		r.lost += record.Lost
		r.longCost = max(r.longCost, int64(record.Cost))
	}
	return seen, nil
}
