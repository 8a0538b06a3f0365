package main

import (
	"fmt"
	"time"

	"ftclock/test/measure"
	"ftclock/test/rig"
)

// bins is where the programs lie that were built.
const bins = "bin"

// machine is the kvmclock guest in a QEMU without libvirt, with that environment and those arguments more.
func (b *bench) machine(env []string, args ...string) (*rig.QEMU, error) {
	return rig.Start(env, append([]string{"-machine", "pc,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=16M,share=on", "-m", "16",
		"-kernel", b.elf}, args...)...)
}

// cont times conts and other commands in turns, each way once in a round.
func (b *bench) cont() (string, error) {
	guests, end, err := b.fourWays()
	defer end()
	if err != nil {
		return "", err
	}
	stock, realtime, attached, preloaded := guests[0], guests[1], guests[2], guests[3]
	// Each QEMU has one client only: of two, both hear of a cont, and what carries that to the second takes the processor from the first.
	through, err := b.keepBy("stock QEMU through socat", false, (*rig.QEMU).DialSocat)
	if err != nil {
		return "", err
	}
	defer through.end()
	past, err := b.keepBy("ftclock attached, past the shim", true, (*rig.QEMU).Dial)
	if err != nil {
		return "", err
	}
	defer past.end()
	attached.name += ", through the shim"
	preloaded.name += ", through the shim"
	ways := []*kept{stock, through, realtime, past, attached, preloaded}

	// All are paused but the one whose turn it is.
	for _, w := range ways {
		if err := w.shim.Run("stop"); err != nil {
			return "", fmt.Errorf("%s: %w", w.name, err)
		}
	}
	if err := first(stock, past, attached, preloaded); err != nil {
		return "", err
	}
	conts, trips := make(map[string][]float64), make(map[string][]float64)
	timed := func(into map[string][]float64, w *kept, command string) error {
		begin := time.Now()
		_, err := w.shim.Execute(command, nil)
		into[w.name] = append(into[w.name], measure.Micros(time.Since(begin)))
		if err != nil {
			err = fmt.Errorf("%s: %w", w.name, err)
		}
		return err
	}
	began := time.Now()
	for i := range pick(b, 2000, 20) {
		if b.late(began) {
			break
		}
		turns := measure.Turns(ways, i)
		for _, w := range turns {
			if err := timed(conts, w, "cont"); err != nil {
				return "", err
			}
			if err := w.shim.Run("stop"); err != nil {
				return "", fmt.Errorf("%s: %w", w.name, err)
			}
		}
		for _, w := range turns {
			if err := timed(trips, w, "query-status"); err != nil {
				return "", err
			}
		}
	}

	t := measure.NewTable("in µs", "cont", "over stock, pairwise", "ratio", "query-status", "over stock, pairwise", "ratio")
	for _, w := range ways {
		cells := []string{w.name}
		for _, all := range []map[string][]float64{conts, trips} {
			base := all[stock.name]
			cells = append(cells, fmt.Sprintf("%.0f", measure.Median(all[w.name])))
			if w == stock {
				cells = append(cells, "", "")
				continue
			}
			cells = append(cells, fmt.Sprintf("%+.0f", measure.Median(measure.Differences(all[w.name], base))), fmt.Sprintf("× %.2f", measure.Median(all[w.name])/measure.Median(base)))
		}
		t.Row(cells...)
	}
	// Each of stock's pauses lasted for the turns of all the others.
	if err := b.kept("at conts", time.Duration(len(conts[stock.name]))*100*time.Microsecond, stock, past, attached, preloaded); err != nil {
		return "", err
	}
	var costs []float64
	for _, k := range []*kept{preloaded, attached} {
		status, err := k.qemu.Status(256)
		if err != nil {
			return "", err
		}
		costs = nil
		for _, r := range status.Records {
			if r.Ordered == 1 {
				costs = append(costs, float64(r.Cost)/1e3)
			}
		}
		b.check(len(costs) > 0, "%s: no cont through the shim had an order", k.name)
	}
	relay := measure.Median(measure.Differences(conts[attached.name], conts[past.name]))
	fmt.Fprintf(t, "\nMedians of %d rounds, each way once in a round, each in a QEMU of its own, the others paused. Of a cont through the shim the module takes "+
		"**%.1f µs** (median of its own records; 99 %%: %.1f µs), its ioctls and the write that it leaves out included; relay and order together add "+
		"**%.0f µs**, where socat adds %.0f µs. The order alone is BenchmarkOrder below. An agent and NTP do nothing at a cont.\n",
		len(conts[stock.name]), measure.Median(costs), measure.Quantile(costs, 0.99), relay,
		measure.Median(measure.Differences(conts[through.name], conts[stock.name])))
	return t.String(), nil
}
