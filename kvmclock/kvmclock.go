// Package kvmclock knows how fast a guest's clock runs by itself.
//
// kvmclock and CLOCK_MONOTONIC_RAW are the same TSC, scaled to nanoseconds by two factors that the kernel makes of its frequency in
// whole kHz: kvmclock's has 32 bits and more, CLOCK_MONOTONIC_RAW's some 23. So they go apart by up to 230 ns a second, always by
// the same.
package kvmclock

import (
	"math/bits"
	"os"
	"strings"
)

// Drift is how much faster kvmclock runs than CLOCK_MONOTONIC_RAW, as a share of it (1e-9: 1 ns a second), on a host whose clock
// source is a TSC of so many kHz. It isn't known for 0.
func Drift(khz uint32) float64 {
	if khz == 0 {
		return 0
	}
	multiplier, shift := scale(khz)
	raw := float64(multiplier) / float64(uint64(1)<<shift) // ns a tick
	return 1e6/float64(khz)/raw - 1
}

// scale is how the kernel makes ns of ticks of a clock source: times a multiplier, shifted right
// (__clocksource_update_freq_scale and clocks_calc_mult_shift in kernel/time/clocksource.c, Linux 6.1).
func scale(khz uint32) (multiplier uint64, shift uint) {
	const (
		longest = 600             // s that must be counted without an overflow
		maximum = 11              // percent by which NTP may change the multiplier
		word    = uint64(1) << 32 // which it must fit
	)
	room := uint(32 - bits.Len64(longest*1000*uint64(khz)>>32))
	for shift = 32; shift > 0; shift-- {
		multiplier = (uint64(1e6)<<shift + uint64(khz)/2) / uint64(khz)
		if multiplier>>room == 0 {
			break
		}
	}
	for multiplier+multiplier*maximum/100 >= word {
		multiplier >>= 1
		shift--
	}
	return multiplier, shift
}

// OnTSC says whether the host's clock source is the TSC, as Drift has it.
func OnTSC() bool {
	text, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	return err == nil && strings.TrimSpace(string(text)) == "tsc"
}
