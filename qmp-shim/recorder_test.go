package shim

import (
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// A policy that holds is told of in the log once a day, while there is more.
func TestHeldIsTold(t *testing.T) {
	var log strings.Builder
	var b book
	at := time.Date(2026, 3, 4, 5, 6, 0, 0, time.UTC)
	for i, step := range []struct {
		held  time.Duration
		after time.Duration
		lines int
	}{{0, 0, 0}, {40 * time.Second, time.Minute, 1}, {80 * time.Second, 23 * time.Hour, 1}, {80 * time.Second, time.Hour, 2}, {80 * time.Second, 48 * time.Hour, 2},
		{120 * time.Second, time.Minute, 3}} {
		at = at.Add(step.after)
		if b.tellHeld(zerolog.New(&log), uint64(step.held), at); strings.Count(log.String(), "\n") != step.lines {
			t.Errorf("step %d: want %d lines:\n%s", i, step.lines, log.String())
		}
	}
	if !strings.Contains(log.String(), `"held_ms":120000`) {
		t.Error(log.String())
	}
}
