package kvmclock

import (
	"math"
	"testing"
)

// CLOCK_MONOTONIC_RAW is off by half of its multiplier's unit at most.
func TestDrift(t *testing.T) {
	for _, c := range []struct {
		khz        uint32
		multiplier uint64
		shift      uint
		ppb        float64
	}{
		{2_000_000, 4_194_304, 23, 0},    // half a nanosecond a tick, without a rest
		{2_095_995, 8_004_416, 24, 5.13}, // measured on Linux 6.1: 5.14
		{2_900_000, 5_785_247, 24, -17.88},
		{1_000_000, 8_388_608, 23, 0},
	} {
		multiplier, shift := scale(c.khz)
		got := Drift(c.khz) * 1e9
		if multiplier != c.multiplier || shift != c.shift || math.Abs(got-c.ppb) > 0.01 {
			t.Errorf("%d kHz: %d >> %d, %.2f ppb; want %d >> %d, %.2f ppb", c.khz, multiplier, shift, got, c.multiplier, c.shift, c.ppb)
		}
	}
	if got := Drift(0); got != 0 {
		t.Errorf("0 kHz: %v", got)
	}
	for khz := uint32(500_000); khz < 6_000_000; khz += 997 {
		if d := Drift(khz) * 1e9; math.Abs(d) > 240 {
			t.Fatalf("%d kHz: %.1f ppb, and the page about accuracy says 230", khz, d)
		}
	}
}
