package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"ftclock/test/qmp"
	"ftclock/test/rig"
)

const (
	rounds      = 40
	perRound    = 100 // round trips of each kind in a round
	checkpoints = 500
	idle        = 10 * time.Second
)

// connections are the ways to one QEMU.
type connections struct{ direct, socat, shim *qmp.Conn }

func measure(out io.Writer) (err error) {
	if why := rig.Missing(); why != "" {
		return errors.New(why)
	}
	q, err := rig.Start(nil, "-machine", "pc", "-m", "16")
	if err != nil {
		return err
	}
	defer q.Close()
	var c connections
	if c.direct, err = q.Dial(); err != nil {
		return err
	}
	if c.socat, err = q.DialSocat(); err != nil {
		return err
	}
	if c.shim, err = q.DialShim("bin"); err != nil {
		return err
	}
	if !rig.KVM() {
		fmt.Fprintln(out, "QEMU runs without KVM (-accel tcg): the relay is what is measured; the module has nothing to do.")
	}
	fmt.Fprintf(out, "QMP round trips (query-status), median of %d each, taking turns:\n", rounds*perRound)
	trips, err := c.roundTrips()
	if err != nil {
		return err
	}
	for _, name := range []string{"direct", "socat", "shim"} {
		fmt.Fprintf(out, "  %-7s %7.1f µs   × %.2f\n", name, trips[name].Seconds()*1e6, trips[name].Seconds()/trips["direct"].Seconds())
	}

	before, err := rig.CPU(q.Pair...)
	if err != nil {
		return err
	}
	for range checkpoints {
		for _, command := range []string{"stop", "cont"} {
			if _, err := c.shim.Execute(command, nil); err != nil {
				return err
			}
		}
	}
	after, err := rig.CPU(q.Pair...)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "processor time of the pair for a checkpoint (stop and cont): %.0f µs, mean of %d\n",
		float64(after-before)/1e3/checkpoints, checkpoints)

	// At the end of a minute that had pauses it is written into the record, once: idle is what comes after.
	time.Sleep(time.Until(time.Now().Truncate(time.Minute).Add(time.Minute + time.Second)))
	first, err := rig.Switches(q.Pair...)
	if err != nil {
		return err
	}
	time.Sleep(idle)
	last, err := rig.Switches(q.Pair...)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "wake-ups of the pair when nothing passes: %d in %v\n", last-first, idle)

	var all, own float64
	for i, name := range []string{"keeper", "worker"} {
		pss, anonymous, err := rig.MemoryKiB(q.Pair[i])
		if err != nil {
			return err
		}
		all, own = all+pss, own+anonymous
		fmt.Fprintf(out, "memory of the %s (PSS): %.1f MiB, of which %.1f MiB are its own\n", name, pss/1024, anonymous/1024)
	}
	fmt.Fprintf(out, "memory of the pair (PSS): %.1f MiB for the first domain, %.1f MiB for each further one, which shares the program\n",
		all/1024, own/1024)
	return nil
}

// roundTrips gives the median round trip of each way.
func (c *connections) roundTrips() (map[string]time.Duration, error) {
	ways := map[string]*qmp.Conn{"direct": c.direct, "socat": c.socat, "shim": c.shim}
	all := make(map[string][]time.Duration)
	for range rounds {
		for name, conn := range ways {
			for range perRound {
				begin := time.Now()
				if _, err := conn.Execute("query-status", nil); err != nil {
					return nil, err
				}
				all[name] = append(all[name], time.Since(begin))
			}
		}
	}
	medians := make(map[string]time.Duration)
	for name, times := range all {
		slices.Sort(times)
		medians[name] = times[len(times)/2]
	}
	return medians, nil
}

// count prints the module's instructions, which are the same on any machine.
func count(out io.Writer) error {
	counted, err := rig.Instructions()
	if err != nil {
		return err
	}
	for _, c := range counted {
		fmt.Fprintf(out, "module's %s: %.0f instructions, %.0f ioctls, %.0f readings of clocks\n", c.Name, c.Instructions, c.Ioctls, c.Readings)
	}
	return nil
}
