package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"ftclock/test/guest"
	"ftclock/test/measure"
)

// verdict is what is wrong with the clocks, or with the measuring of them.
func verdict(stock, kept *course) error {
	var wrong []string
	if stock.drift() < stock.paused/2 {
		wrong = append(wrong, fmt.Sprintf("the measuring is broken: without ftclock the guest was paused for %s ms, but lost only %s ms",
			fixed(ms(stock.paused), 1), fixed(ms(stock.drift()), 1)))
	}
	if drift := kept.drift(); guest.Off(drift) {
		wrong = append(wrong, fmt.Sprintf("with ftclock the guest's clock is off by %s µs, more than %s µs",
			fixed(us(drift), 1), fixed(us(guest.MaxDrift), 0)))
	}
	if kept.backsteps > 0 {
		wrong = append(wrong, fmt.Sprintf("with ftclock the guest saw its clock go back %d times", kept.backsteps))
	}
	if len(wrong) == 0 {
		return nil
	}
	return errors.New(strings.Join(wrong, "; "))
}

// ratio of two medians, as it is read; "-" where there is none.
func ratio(stock, kept []int64) string {
	if measure.Median(stock) == 0 || measure.Median(kept) == 0 {
		return "-"
	}
	return fmt.Sprintf("× %.2f", float64(measure.Median(kept))/float64(measure.Median(stock)))
}

func ms(ns int64) float64 { return float64(ns) / 1e6 }
func us(ns int64) float64 { return float64(ns) / 1e3 }

// fixed is v with that many decimals, and 0 never with a sign.
func fixed(v float64, decimals int) string {
	s := strconv.FormatFloat(v, 'f', decimals, 64)
	if strings.Trim(s, "-0.") == "" {
		return strings.TrimPrefix(s, "-")
	}
	return s
}

// table is what both runs measured, a line each, without a newline at the end.
func table(stock, kept *course) string {
	var b strings.Builder
	row := func(label, left, right, ratio string) {
		// Printf counts runes, which are columns here.
		b.WriteString(strings.TrimRight(fmt.Sprintf("%-42s %13s %13s %8s", label, left, right, ratio), " ") + "\n")
	}
	both := func(label string, value func(*course) string, ratio string) {
		row(label, value(stock), value(kept), ratio)
	}

	row("", "stock", "ftclock", "ratio")
	both("checkpoints", func(c *course) string { return strconv.Itoa(c.points[len(c.points)-1].checkpoints) }, "")
	both("guest was paused, STOP to RESUME, in all", func(c *course) string { return fixed(ms(c.paused), 1) + " ms" }, "")
	both("guest's clock lost", func(c *course) string { return fixed(ms(c.drift()), 1) + " ms" }, "")
	both("drift left", func(c *course) string { return fixed(us(c.drift()), 2) + " µs" }, "")
	both("guest saw its clock go back, times", func(c *course) string { return strconv.FormatUint(c.backsteps, 10) }, "")
	both("suspend and resume, less the pause, median", func(c *course) string { return fixed(us(measure.Median(c.overheads)), 0) + " µs" },
		ratio(stock.overheads, kept.overheads))
	both("QMP stop and cont, median", func(c *course) string { return fixed(us(measure.Median(c.commands)), 0) + " µs" },
		ratio(stock.commands, kept.commands))
	if len(kept.module) > 0 {
		row("module's part of a cont, median", "-", fixed(us(measure.Median(kept.module)), 1)+" µs", "")
		row("module's part of a cont, longest", "-", fixed(us(slices.Max(kept.module)), 1)+" µs", "")
	}
	return strings.TrimSuffix(b.String(), "\n")
}
