package main

import (
	"os"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/measure"
	"ftclock/test/rig"
)

// A pair that has nothing to do sleeps, and two processes of it take no more than so much memory.
func TestCost(t *testing.T) {
	const maxPSS = 12 << 10 // KiB
	if why := rig.Missing(); why != "" {
		if os.Getenv("FTCLOCK_REQUIRE") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	const bin = "../../bin"
	if _, err := os.Stat(bin + "/ftclock-shim"); err != nil {
		t.Fatalf("%v; fix: make build", err)
	}
	q := check.Value(rig.Start(nil, "-machine", "pc", "-m", "16"))(t)
	defer q.Close()
	conn := check.Value(q.DialShim(bin))(t)
	for range 100 {
		check.NoError(t, conn.Run("stop", "cont"))
	}
	// What the last pause left to do ends by itself, however long that takes here: then there is a second without a wake-up.
	switches := func() uint64 {
		t.Helper()
		return check.Value(measure.Switches(q.Shim))(t)
	}
	last := switches()
	for end := time.Now().Add(2 * time.Minute); ; {
		time.Sleep(5 * time.Second)
		now := switches()
		if now == last {
			break
		}
		if t.Logf("%d wake-ups in 5 s", now-last); time.Now().After(end) {
			t.Fatal("the shim doesn't come to rest")
		}
		last = now
	}
	pss, _, err := measure.MemoryKiB(q.Shim)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the shim's memory (PSS): %.1f MiB", pss/1024)
	if pss > maxPSS {
		t.Errorf("the shim takes %.0f KiB, the bound is %d", pss, maxPSS)
	}
}
