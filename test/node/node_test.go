package node

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ftclock/attach"
	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/endings"
	"ftclock/test/guest"
)

func running(t *testing.T, name string, boxed bool) (*qemu, *guest.Clock) {
	t.Helper()
	q := check.Value(startQEMU(name, boxed))(t)
	t.Cleanup(q.end)
	check.NoError(t, q.connect())
	return q, domaintest.ClockOfProcess(t, q.pid)
}

func pauses(t *testing.T, q *qemu, n int) {
	t.Helper()
	for range n {
		check.NoError(t, q.monitor.Pause(time.Duration(1+rand.IntN(9))*time.Millisecond))
	}
}

// Two of three QEMUs are named: one of them was there before the service, the other is in a container. The service goes and comes.
func TestKVMNode(t *testing.T) {
	named(t, "ha-*")
	plain, plainClock := running(t, "ha-plain", false)
	node := startService(t)
	boxed, boxedClock := running(t, "ha-boxed", true)
	other, otherClock := running(t, "other", false)
	for _, q := range []*qemu{plain, boxed} {
		node.await(t, fmt.Sprintf("%s (QEMU %d) is served from now on", q.name, q.pid))
		if !q.served() {
			t.Errorf("%s isn't served", q.name)
		}
	}
	clocks := map[*qemu]*guest.Clock{plain: plainClock, boxed: boxedClock}
	before := map[*qemu]int64{}
	for q, clock := range clocks {
		before[q] = domaintest.Offset(t, clock)
		pauses(t, q, 100)
		shown(t, q, 100)
	}
	node.stop(t)
	for q := range clocks {
		pauses(t, q, 20)
	}
	node = startService(t)
	for q, clock := range clocks {
		node.await(t, fmt.Sprintf("%s (QEMU %d) is served already", q.name, q.pid))
		pauses(t, q, 80)
		lost := domaintest.Kept(t, clock, before[q], "%s lost", q.name)
		t.Logf("%s lost %d ns in 200 pauses", q.name, lost)
		domaintest.NoBacksteps(t, clock)
	}
	// The third one is as without ftclock.
	if _, loaded, err := attach.Loaded(other.pid); loaded || err != nil {
		t.Errorf("the module is in the third: %v", err)
	}
	lost := domaintest.Offset(t, otherClock)
	pauses(t, other, 10)
	if lost = domaintest.Offset(t, otherClock) - lost; lost <= guest.MaxDrift {
		t.Errorf("the third lost %d ns only: is it corrected?", lost)
	}
	nothingWritten(t, boxed)
	infos := check.Value(control.List(control.Dir))(t)
	if len(infos) != 2 {
		t.Errorf("shims: %+v", infos)
	}

	// A shim that goes with its service, as in a container, leaves the module behind. The next service gives it a shim.
	node.stop(t)
	if left := endings.Kill(boxed.shims, time.Minute); len(left) > 0 || boxed.served() {
		t.Fatal("the shim runs on", left)
	}
	shownLost(t, boxed)
	pauses(t, boxed, 20)
	node = startService(t)
	node.await(t, "ha-boxed (QEMU "+strconv.Itoa(boxed.pid)+") is served from now on")
	pauses(t, boxed, 20)
	domaintest.Kept(t, boxedClock, before[boxed], "the boxed one lost")
	// What somebody has switched off stays so.
	check.Output(t, exec.Command(binary(t), "detach", strconv.Itoa(plain.pid)))
	node.stop(t)
	node = startService(t)
	node.await(t, fmt.Sprintf("ha-plain (QEMU %d) is left alone: its correction was switched off", plain.pid))
	if plain.served() {
		t.Error("it is served")
	}
}

// nothingWritten checks a QEMU in a container.
func nothingWritten(t *testing.T, q *qemu) {
	t.Helper()
	root := check.Value(built.Root())(t)
	for _, at := range []string{root + "/bin", "/tmp"} {
		if left := check.Value(os.ReadDir(fmt.Sprintf("/proc/%d/root%s", q.pid, at)))(t); len(left) > 0 {
			t.Errorf("something was written to its %s: %v", at, left)
		}
	}
	maps := string(check.Value(os.ReadFile(fmt.Sprintf("/proc/%d/maps", q.pid)))(t))
	if !strings.Contains(maps, "/memfd:ftclock-module (deleted)") || strings.Contains(maps, "libftclock-qemu.so") {
		t.Errorf("the module isn't in a memory file:\n%s", maps)
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", q.pid))
	for _, fd := range fds {
		if link, err := os.Readlink(fd); err == nil && strings.Contains(link, "ftclock-module") {
			t.Errorf("it has the module open: %s", link)
		}
	}
}

// lives starts a QEMU, has it served if it is named, pauses it, and ends it. It gives how long it waited for that since it could
// be served.
func lives(name string, boxed, short bool) (waited time.Duration, err error) {
	q, err := startQEMU(name, boxed)
	if err != nil {
		return 0, err
	}
	defer q.end()
	if short { // it ends at any moment of its start
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Millisecond)
		return 0, nil
	}
	is := strings.HasPrefix(name, "ha-")
	within := time.Now().Add(5 * time.Minute)
	for ; attach.Ready(q.pid) != nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(within) {
			return 0, fmt.Errorf("%s: %w", name, attach.Ready(q.pid))
		}
	}
	ready := time.Now()
	for ; is && !q.served(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(within) {
			return 0, errors.New(name + " is never served")
		}
	}
	waited = time.Since(ready)
	if err := q.connect(); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	for range 10 {
		if err := q.monitor.Pause(5 * time.Millisecond); err != nil {
			return 0, fmt.Errorf("%s was harmed: %w", name, err)
		}
	}
	_, loaded, err := attach.Loaded(q.pid)
	if err != nil || loaded != is {
		return 0, fmt.Errorf("%s: loaded is %t: %w", name, loaded, err)
	}
	if is {
		s, err := q.status()
		if err != nil || s.Dropped+s.Anchored < 10 {
			return 0, fmt.Errorf("%s: %+v, %w", name, s, err)
		}
	}
	return waited, nil
}

// QEMUs start and end at random. Each that is named is served, and nothing piles up in the service.
func TestKVMNodeAtRandom(t *testing.T) {
	named(t, "ha-*")
	node := startService(t)
	idle := node.descriptors()
	total, length := 20, time.Duration(0)
	if os.Getenv("FTCLOCK_LONG") == "1" {
		total, length = 100, 10*time.Minute
	}
	const beside = 4
	began := time.Now()
	var mu sync.Mutex
	var all []time.Duration
	var group sync.WaitGroup
	for worker := range beside {
		group.Go(func() {
			for i := worker; i < total; i += beside {
				name := []string{"ha", "ha", "other"}[rand.IntN(3)] + fmt.Sprintf("-%d", i)
				waited, err := lives(name, rand.IntN(2) == 0, rand.IntN(4) == 0)
				if err != nil {
					t.Error(err)
				}
				if waited > 0 && strings.HasPrefix(name, "ha-") {
					mu.Lock()
					all = append(all, waited)
					mu.Unlock()
				}
				time.Sleep(time.Until(began.Add(length * time.Duration(i) / time.Duration(total))))
			}
		})
	}
	group.Wait()
	longest := time.Duration(0)
	for _, waited := range all {
		longest = max(longest, waited)
	}
	t.Logf("%d QEMUs in %v; %d were served, each within %v of being ready", total, time.Since(began).Round(time.Second), len(all), longest)
	check.Await(t, time.Minute, 20*time.Millisecond, func() bool { return node.descriptors() <= idle+1 }, "descriptors pile up in the service: %d before", idle)
	check.Await(t, time.Minute, 20*time.Millisecond, func() bool {
		infos, err := control.List(control.Dir)
		return err == nil && len(infos) == 0
	}, "shims are left")
}
