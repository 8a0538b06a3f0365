package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"ftclock/test/measure"
	"ftclock/test/qmp"
	"ftclock/test/rig"
)

const (
	rounds      = 10000
	checkpoints = 500
	idle        = 10 * time.Second
)

// A way is one to a QEMU of its own: of two clients of one QEMU, both hear of a stop, and what carries that to the second takes the
// processor from the first.
type way struct {
	name string
	qemu *rig.QEMU
	conn *qmp.Conn
	pids func() []int // what stands between
}

// The trips that are timed, as the commands of each. All guests are paused but the one whose turn it is.
var trips = [][]string{{"query-status"}, {"cont", "stop"}}

func costs(out io.Writer) error {
	if why := rig.Missing(); why != "" {
		return errors.New(why)
	}
	var ways []*way
	for _, w := range []struct {
		name string
		dial func(*rig.QEMU) (*qmp.Conn, error)
		pids func(*rig.QEMU) []int
	}{
		{"direct", (*rig.QEMU).Dial, func(*rig.QEMU) []int { return nil }},
		{"socat", (*rig.QEMU).DialSocat, func(q *rig.QEMU) []int { return []int{q.Socat} }},
		{"shim", func(q *rig.QEMU) (*qmp.Conn, error) { return q.DialShim("bin") }, func(q *rig.QEMU) []int { return []int{q.Shim} }},
	} {
		q, err := rig.Start(nil, machine()...)
		if err != nil {
			return err
		}
		defer q.Close()
		conn, err := w.dial(q)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		ways = append(ways, &way{w.name, q, conn, func() []int { return w.pids(q) }})
	}
	if !rig.KVM() {
		fmt.Fprintln(out, "QEMU runs without KVM (-accel tcg): the relay is what is measured; the module has nothing to do.")
	}
	for _, trip := range trips {
		if err := roundTrips(out, ways, trip); err != nil {
			return err
		}
	}
	return rest(out, ways[2].qemu, ways[2].conn)
}

// machine is a QEMU's: where there is no KVM it has no processor, which would take one of the host's, to emulate it.
func machine() []string {
	if rig.KVM() {
		return []string{"-machine", "pc", "-m", "16"}
	}
	return []string{"-machine", "none"}
}

// roundTrips times the commands, each way once in a round, while the guests of the others are paused.
func roundTrips(out io.Writer, ways []*way, commands []string) error {
	times := make([][]float64, len(ways)) // µs
	switches := make([]float64, len(ways))
	for i, w := range ways {
		if err := w.conn.Run("stop"); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		n, err := measure.Switches(w.pids()...)
		if err != nil {
			return err
		}
		switches[i] = -float64(n)
	}
	for round := range rounds {
		for turn := range ways {
			i := (round + turn) % len(ways) // whose turn is first finds other things in the caches than whose is last
			begin := time.Now()
			if err := ways[i].conn.Run(commands...); err != nil {
				return fmt.Errorf("%s: %w", ways[i].name, err)
			}
			times[i] = append(times[i], measure.Micros(time.Since(begin)))
		}
	}
	fmt.Fprintf(out, "QMP round trip (%v), %d each way, taking turns:\n", commands, rounds)
	for i, w := range ways {
		n, err := measure.Switches(w.pids()...)
		if err != nil {
			return err
		}
		switches[i] += float64(n)
		fmt.Fprintf(out, "  %-7s median %7.1f µs   × %.3f of direct, pairwise %+6.1f µs    99 %% %7.1f µs   × %.3f    wake-ups %.2f\n", w.name,
			measure.Median(times[i]), measure.Median(times[i])/measure.Median(times[0]), measure.Median(measure.Differences(times[i], times[0])),
			measure.Quantile(times[i], 0.99), measure.Quantile(times[i], 0.99)/measure.Quantile(times[0], 0.99), switches[i]/rounds)
	}
	socat, shim := times[1], times[2]
	fmt.Fprintf(out, "  shim over socat: median × %.3f, pairwise %+.1f µs, 99 %% × %.3f\n", measure.Median(shim)/measure.Median(socat),
		measure.Median(measure.Differences(shim, socat)), measure.Quantile(shim, 0.99)/measure.Quantile(socat, 0.99))
	return nil
}

// rest measures what else the shim costs.
func rest(out io.Writer, q *rig.QEMU, conn *qmp.Conn) error {
	before, err := measure.CPU(q.Shim)
	if err != nil {
		return err
	}
	for range checkpoints {
		if err := conn.Run("stop", "cont"); err != nil {
			return err
		}
	}
	after, err := measure.CPU(q.Shim)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "processor time of the shim for a checkpoint (stop and cont): %.0f µs, mean of %d\n",
		float64(after-before)/1e3/checkpoints, checkpoints)

	// At the end of a minute that had pauses it is written into the record, once: idle is what comes after.
	time.Sleep(time.Until(time.Now().Truncate(time.Minute).Add(time.Minute + time.Second)))
	first, err := measure.Switches(q.Shim)
	if err != nil {
		return err
	}
	time.Sleep(idle)
	last, err := measure.Switches(q.Shim)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "wake-ups of the shim when nothing passes: %d in %v\n", last-first, idle)

	pss, own, err := measure.MemoryKiB(q.Shim)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "memory of the shim (PSS): %.1f MiB for the first domain, %.1f MiB for each further one, which shares the program\n",
		pss/1024, own/1024)
	return nil
}

// count prints the module's instructions, which are the same on any machine.
func count(out io.Writer) error {
	counted, err := measure.Instructions()
	if err != nil {
		return err
	}
	for _, c := range counted {
		fmt.Fprintf(out, "module's %s: %.0f instructions, %.0f ioctls, %.0f readings of clocks: %s\n",
			c.Name, c.Instructions, c.Ioctls, c.Readings, c.Split())
	}
	return nil
}
