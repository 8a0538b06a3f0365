package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"
)

func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(m.Run, privatelibvirt.Installed("../..")))
}

// A short form of `make soak`.
func TestKVMSoak(t *testing.T) {
	pauses := 2000
	if kvmhost.Emulated() {
		pauses = 600
	}
	r := check.Value(soak(plan{pauses, 2 * time.Millisecond, time.Hour}, t.Output()))(t)
	t.Log("\n" + r.String())
	if err := r.verdict(); err != nil {
		t.Error(err)
	}
	if len(r.residuals) != pauses {
		t.Errorf("%d residuals", len(r.residuals))
	}
	for _, name := range []string{"soak.svg", "soak.png"} {
		path := filepath.Join(t.TempDir(), name)
		check.NoError(t, r.draw(path))
		if info, err := os.Stat(path); err != nil || info.Size() < 10_000 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if err := r.draw("soak.gif"); err == nil {
		t.Error("a picture of no kind was drawn")
	}
}

// What is wrong with a clock is found.
func TestVerdict(t *testing.T) {
	good := func() *result {
		return &result{plan: plan{longest: 2 * time.Millisecond}, points: []point{{0, 0}, {1000, 500}, {2000, -300}}, residuals: make([]int64, 2000), lost: 2000 * int64(time.Millisecond)}
	}
	if err := good().verdict(); err != nil {
		t.Error(err)
	}
	for want, spoil := range map[string]func(*result){
		"off by -10001": func(r *result) { r.points[1].drift = -10001 },
		"drifts by 10000": func(r *result) {
			r.points, r.residuals = []point{{0, 0}, {500_000, 5000}, {1_000_000, 10_000}}, make([]int64, 1_000_001)
			r.lost *= 1000
		},
		"go back 1 times": func(r *result) { r.backsteps = 1 },
		"no pauses":       func(r *result) { r.lost = 1 },
	} {
		r := good()
		spoil(r)
		if err := r.verdict(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	r := &result{residuals: []int64{-5, 1, 2, 3}}
	if r.quantile(0) != 1 || r.quantile(0.5) != 3 || r.quantile(1) != 5 {
		t.Errorf("quantiles %d, %d, %d", r.quantile(0), r.quantile(0.5), r.quantile(1))
	}
}
