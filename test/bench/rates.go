package main

import (
	"fmt"
	"time"

	"ftclock/test/measure"
	"ftclock/test/qmp"
)

// checkpointPause is for how long a guest stands between the answer to a stop and the cont.
const checkpointPause = 500 * time.Microsecond

// rates makes checkpoints of two guests in turns, at several rates, and compares for how long each isn't running.
func (b *bench) rates() (string, error) {
	stock, err := b.keep("stock QEMU", false)
	if err != nil {
		return "", err
	}
	defer stock.qemu.Close()
	ours, err := b.keep("ftclock", true)
	if err != nil {
		return "", err
	}
	defer ours.qemu.Close()
	conns := []*qmp.Conn{stock.shim, ours.shim}
	for _, conn := range conns {
		if err := conn.Run("stop"); err != nil {
			return "", err
		}
	}
	if err := first(stock, ours); err != nil {
		return "", err
	}
	var pauses time.Duration
	t := measure.NewTable("checkpoints a second", "made in fact", "stop and cont: stock", "ftclock", "difference", "duty cycle lost to ftclock", "drift left")
	drifted := ours.first
	for _, rate := range []int{5, 25, 40, 200} {
		var took [2][]float64
		var more []float64
		var made int
		var spent time.Duration
		for range pick(b, 6, 1) {
			var middle [2]float64
			for i, conn := range conns {
				began := time.Now()
				times, err := checkpoints(conn, rate, pick(b, 2*time.Second, 500*time.Millisecond))
				if err != nil {
					return "", err
				}
				spent += time.Since(began)
				made += len(times)
				if i == 0 {
					pauses += time.Duration(len(times)) * checkpointPause
				}
				took[i], middle[i] = append(took[i], times...), measure.Median(times)
			}
			more = append(more, middle[1]-middle[0])
		}
		offset, _, err := ours.look()
		if err != nil {
			return "", err
		}
		left := measure.Drift(offset - drifted)
		drifted = offset
		t.Row(fmt.Sprint(rate), fmt.Sprintf("%.1f", float64(made)/spent.Seconds()), fmt.Sprintf("%.0f µs", measure.Median(took[0])),
			fmt.Sprintf("%.0f µs", measure.Median(took[1])), fmt.Sprintf("%+.0f µs", measure.Median(more)), fmt.Sprintf("%.2f %%", measure.Median(more)*float64(rate)/1e4), left)
	}
	if err := b.kept("at rates", pauses, stock, ours); err != nil {
		return "", err
	}
	t.WriteString("\nTwo guests take turns of two seconds, the other one paused. The difference is the median of that of two turns' medians. The duty cycle is the share of a " +
		"second for which the guest is paused longer than with stock QEMU: the difference times the rate.\n")
	return t.String(), nil
}

// checkpoints has a paused guest run for that long with so many checkpoints a second, and gives what stop and cont of each
// took, in µs.
func checkpoints(conn *qmp.Conn, rate int, length time.Duration) (took []float64, err error) {
	if err := conn.Run("cont"); err != nil {
		return nil, err
	}
	begin := time.Now()
	for {
		time.Sleep(time.Until(begin.Add(time.Duration(len(took)+1) * time.Second / time.Duration(rate))))
		if time.Since(begin) > length {
			return took, conn.Run("stop")
		}
		from := time.Now()
		if err := conn.Run("stop"); err != nil {
			return nil, err
		}
		stopped := time.Now()
		time.Sleep(checkpointPause)
		resuming := time.Now()
		if err := conn.Run("cont"); err != nil {
			return nil, err
		}
		took = append(took, measure.Micros(stopped.Sub(from)+time.Since(resuming)))
	}
}
