package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/rig"
)

// A pair that has nothing to do sleeps, and two processes of it take no more than so much memory.
func TestKVMCost(t *testing.T) {
	const maxPSS = 12 << 10 // KiB
	_, err := os.Stat("/dev/kvm")
	why := rig.Missing()
	if err != nil {
		why = err.Error() + "; fix: load kvm_intel or kvm_amd"
	}
	if why != "" {
		if os.Getenv("FTCLOCK_REQUIRE") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	bin := t.TempDir()
	shim := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(bin, "ftclock-shim"), "ftclock/cmd/ftclock-shim")
	shim.Env = append(os.Environ(), "CGO_ENABLED=0")
	module := exec.Command("make", "-C", "../..", "bin/libftclock-qemu.so")
	for _, build := range []*exec.Cmd{shim, module} {
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", build, err, out)
		}
	}
	text, err := os.ReadFile("../../bin/libftclock-qemu.so")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "libftclock-qemu.so"), text, 0o755); err != nil {
		t.Fatal(err)
	}
	q, err := rig.Start(nil, "-machine", "pc", "-m", "16")
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	conn, err := q.DialShim(bin)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		for _, command := range []string{"stop", "cont"} {
			if _, err := conn.Execute(command, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What the last pause left to do ends by itself, however long that takes here: then there is a second without a wake-up.
	switches := func() uint64 {
		t.Helper()
		n, err := rig.Switches(q.Pair...)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	last := switches()
	for end := time.Now().Add(2 * time.Minute); ; {
		time.Sleep(5 * time.Second)
		now := switches()
		if now == last {
			break
		}
		if t.Logf("%d wake-ups in 5 s", now-last); time.Now().After(end) {
			t.Fatal("the pair doesn't come to rest")
		}
		last = now
	}
	total := 0.0
	for _, pid := range q.Pair {
		pss, _, err := rig.MemoryKiB(pid)
		if err != nil {
			t.Fatal(err)
		}
		total += pss
	}
	t.Logf("the pair's memory (PSS): %.1f MiB", total/1024)
	if total > maxPSS {
		t.Errorf("the pair takes %.0f KiB, the bound is %d", total, maxPSS)
	}
}
