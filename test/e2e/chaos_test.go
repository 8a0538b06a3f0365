package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// commands are what virsh is made to do all the time. None changes the domain's state.
var commands = [][]string{
	{"domstate", "chaos"},
	{"dominfo", "chaos"},
	{"domstats", "chaos"},
	{"qemu-monitor-command", "chaos", "--hmp", "info status"},
	{"qemu-monitor-command", "chaos", `{"execute":"query-qmp-schema"}`}, // a large answer
	{"qemu-monitor-command", "chaos", `{"execute":"query-version"}`},
	{"vcpuinfo", "chaos"},
	{"dumpxml", "chaos"},
}

// traffic is what goes on while something is killed.
type traffic struct {
	t       *testing.T
	stop    chan struct{}
	group   sync.WaitGroup
	pauses  atomic.Int64
	virsh   atomic.Int64
	largest atomic.Int64 // ns that a pause or a command took
	floor   int64        // so many pauses there have to be for what was disturbed to have met any
}

func (c *traffic) loop(body func()) {
	c.group.Go(func() {
		for {
			select {
			case <-c.stop:
				return
			default:
				body()
			}
		}
	})
}

func (c *traffic) took(since time.Time) {
	d := int64(time.Since(since))
	for old := c.largest.Load(); d > old && !c.largest.CompareAndSwap(old, d); old = c.largest.Load() {
	}
}

// checkpoints pauses the guest for 5 ms, 40 times a second.
func (c *traffic) checkpoints(stop, cont func() error) {
	c.loop(func() {
		begin := time.Now()
		if err := stop(); err != nil {
			c.t.Errorf("after %d pauses: stop: %v", c.pauses.Load(), err)
		}
		time.Sleep(5 * time.Millisecond)
		if err := cont(); err != nil {
			c.t.Errorf("after %d pauses: cont: %v", c.pauses.Load(), err)
		}
		c.took(begin)
		c.pauses.Add(1)
		time.Sleep(25*time.Millisecond - time.Since(begin))
	})
}

// commands has virsh work. A command that hangs fails, too.
func (c *traffic) commands() {
	c.loop(func() {
		args := commands[rand.IntN(len(commands))]
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		begin := time.Now()
		out, err := exec.CommandContext(ctx, "virsh", append([]string{"-c", privatelibvirt.URI}, args...)...).CombinedOutput()
		if err != nil {
			c.t.Errorf("after %d commands: virsh %s: %v: %s", c.virsh.Load(), strings.Join(args, " "), err, out)
		}
		c.took(begin)
		c.virsh.Add(1)
	})
}

func (c *traffic) end() {
	close(c.stop)
	c.group.Wait()
}

// inChaos runs disturb while there is traffic, and checks that nobody noticed.
func inChaos(t *testing.T, disturb func(t *testing.T, d *privatelibvirt.Domain, c *traffic) string) {
	x := managed("chaos", patientElement)
	check.Value(privatelibvirt.AddMonitor(x))(t)
	d, clock := start(t, x)
	pause(t, d, 5*time.Millisecond)
	before := offset(t, clock)
	began := guest.Raw()
	c := &traffic{t: t, stop: make(chan struct{})}
	end := sync.OnceFunc(c.end)
	defer end() // also where disturb gives up
	what := disturb(t, d, c)
	end()
	// A pause that was cut short, or one over the other monitor, isn't left standing.
	quiet(t, d)
	pause(t, d, 5*time.Millisecond)
	drift := offset(t, clock) - before
	s := status(t, d)
	took := float64(guest.Raw()-began) / 1e9
	t.Logf("%s in %.0f s: %d pauses, %.1f a second, %d virsh commands, the longest took %v; drift %d ns; workers %d, dropped %d, anchored %d, orders %d",
		what, took, c.pauses.Load(), float64(c.pauses.Load())/took, c.virsh.Load(), time.Duration(c.largest.Load()).Round(time.Millisecond),
		drift, s.Workers, s.Dropped, s.Anchored, s.Orders)
	check.Within(t, drift, maxDrift, "drift")
	if active, err := d.IsActive(); err != nil || !active {
		t.Errorf("the domain is gone: %v", err)
	}
	domaintest.NoBacksteps(t, clock)
	if s.State != control.Correcting || s.Disagreements != 0 || s.Passed > 1 || s.Held != 0 {
		s.Records = nil
		t.Errorf("status: %+v", s)
	}
	if c.pauses.Load() < max(1, c.floor) || c.virsh.Load() == 0 {
		t.Errorf("there was too little traffic: %d pauses, want %d", c.pauses.Load(), c.floor)
	}
}

// quiet waits until libvirt has heard of everything that another monitor did, and takes the domain for running. Its answer to a
// command comes behind the events that QEMU sent before.
func quiet(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	var state libvirt.DomainState
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		check.Value(d.QemuMonitorCommand(`{"execute":"query-status"}`, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT))(t)
		var err error
		if state, _, err = d.GetState(); err != nil {
			t.Fatal(err)
		}
		if state == libvirt.DOMAIN_RUNNING {
			return
		}
	}
	t.Fatalf("libvirt takes the domain for one in state %d", state)
}

// whole waits until the shim's pair is complete and answers, and gives its status.
func whole(t *testing.T, d *privatelibvirt.Domain) *control.Status {
	t.Helper()
	return wholeOf(t, domaintest.UUID(t, d))
}

func wholeOf(t *testing.T, uuid string) *control.Status {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		answer, err := control.Ask(control.Dir, uuid, control.Request{Do: "status"})
		if err == nil && unix.Kill(answer.Status.Keeper, 0) == nil && unix.Kill(answer.Status.Shim, 0) == nil {
			return answer.Status
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the shim's pair doesn't become whole again")
	return nil
}

// nextWorker waits for the worker that the keeper starts after that of s, which doesn't answer yet.
func nextWorker(t *testing.T, uuid string, s *control.Status) int {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Microsecond) {
		for _, shim := range shims() {
			pid, _ := strconv.Atoi(shim)
			args, _ := os.ReadFile("/proc/" + shim + "/cmdline")
			if pid != s.Shim && pid != s.Keeper && strings.Contains(string(args), uuid) {
				return pid
			}
		}
	}
	t.Fatal("no worker follows")
	return 0
}

// killYoung kills that worker within 5 ms of its beginning. What is seen first may be a child that Go's runtime forks to try what the
// kernel can do, and that ends by itself.
func killYoung(t *testing.T, uuid string, s *control.Status) (pid int) {
	t.Helper()
	for range 10 {
		pid = nextWorker(t, uuid, s)
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond)
		err := unix.Kill(pid, unix.SIGKILL)
		if err == nil {
			return pid
		}
		if !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
	}
	t.Fatal("each worker is gone before it can be killed")
	return 0
}

func TestKVMChaosKillsOfTheShim(t *testing.T) {
	workers, keepers := check.Count(t, "FTCLOCK_WORKER_KILLS", 40), check.Count(t, "FTCLOCK_KEEPER_KILLS", 10)
	inChaos(t, func(t *testing.T, d *privatelibvirt.Domain, c *traffic) string {
		c.checkpoints(d.Suspend, d.Resume)
		c.commands()
		uuid := domaintest.UUID(t, d)
		c.floor = int64(workers + keepers)
		left, early := []int{workers, keepers}, 0
		for left[0]+left[1] > 0 && !t.Failed() {
			time.Sleep(time.Duration(rand.IntN(300_000)) * time.Microsecond)
			s := wholeOf(t, uuid)
			pid, kind := s.Shim, 0
			if rand.IntN(left[0]+left[1]) >= left[0] {
				pid, kind = s.Keeper, 1
			}
			left[kind]--
			check.NoError(t, unix.Kill(pid, unix.SIGKILL))
			if kind == 0 && left[0] > 0 && rand.IntN(3) == 0 { // a quarter of all, counting both
				pid = killYoung(t, uuid, s)
				left[0]--
				early++
			}
			// Until the other one has replaced it, it may not die as well.
			for again := wholeOf(t, uuid); again.Shim == pid || again.Keeper == pid; again = wholeOf(t, uuid) {
				time.Sleep(time.Millisecond)
			}
		}
		return fmt.Sprintf("%d kills of the worker, %d of them before it answered, %d of the keeper", workers, early, keepers)
	})
}

func TestKVMChaosKillsOfLibvirtd(t *testing.T) {
	kills := check.Count(t, "FTCLOCK_LIBVIRTD_KILLS", 4)
	inChaos(t, func(t *testing.T, d *privatelibvirt.Domain, c *traffic) string {
		// The checkpoints go over a monitor of their own: libvirtd isn't there all the time.
		c.checkpoints(stopAndCont(monitorOf(t, d)))
		c.floor = int64(kills)
		for range kills {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			check.NoError(t, errors.Join(privatelibvirt.Kill(), privatelibvirt.Start()))
			for _, args := range commands {
				if out, err := virsh(args...); err != nil {
					t.Errorf("virsh %s: %v: %s", strings.Join(args, " "), err, out)
				}
				c.virsh.Add(1)
			}
		}
		reconnect(t, d)
		return fmt.Sprintf("%d kills of libvirtd", kills)
	})
}

// reconnect connects to a libvirtd that was started anew.
func reconnect(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	conn = check.Value(libvirt.NewConnect(privatelibvirt.URI))(t)
	d.Domain = check.Value(conn.LookupDomainByName(d.Name))(t)
}

// What virsh says when libvirtd is gone, or goes.
var connectionErrors = []string{"no valid connection", "failed to connect", "Failed to connect", "End of file", "Cannot recv data", "Cannot write data", "Unable to write",
	"socket is closed", "Connection reset", "Broken pipe", "Disconnected from",
	"signal: broken pipe"} // virsh writes to it and dies of that

// mortal is a libvirtd that is killed and started while virsh works.
type mortal struct {
	c *traffic
	// lives is even while libvirtd lives, and grows by each death and each start.
	lives  atomic.Int64
	mu     sync.Mutex // held from a suspend to its resume
	hits   atomic.Int64
	unsure bool // a kill came in the middle of the last suspend or resume
}

func (m *mortal) restart() error {
	m.lives.Add(1)
	err := privatelibvirt.Kill()
	if err == nil {
		err = privatelibvirt.Start()
	}
	m.lives.Add(1)
	return err
}

// virsh runs a command, which may fail by losing its connection in a kill, and by nothing else. hit says that it did.
func (m *mortal) virsh(args ...string) (out string, hit bool) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	before := m.lives.Load()
	begin := time.Now()
	text, err := exec.CommandContext(ctx, "virsh", append([]string{"-c", privatelibvirt.URI}, args...)...).CombinedOutput()
	out = string(text)
	if m.c.virsh.Add(1); err == nil {
		m.c.took(begin)
		return out, false
	}
	killed := before%2 == 1 || m.lives.Load() != before
	for _, e := range connectionErrors {
		if killed && strings.Contains(out+err.Error(), e) {
			m.hits.Add(1)
			return out, true
		}
	}
	// What was cut short before may have been done.
	if args[0] == "resume" && m.unsure && strings.Contains(out, "already running") {
		return out, false
	}
	m.c.t.Errorf("virsh %s: %v, killed meanwhile: %v: %s", strings.Join(args, " "), err, killed, out)
	return out, false
}

// suspend and resume are a pause that libvirtd's death may prolong.
func (m *mortal) suspend() { _, m.unsure = m.virsh("suspend", "chaos") }

func (m *mortal) resume() {
	for {
		_, hit := m.virsh("resume", "chaos")
		if !hit {
			m.unsure = false
			m.c.pauses.Add(1)
			return
		}
		m.unsure = true
	}
}

// virsh suspends and resumes the guest through the shim, and asks for it, while libvirtd dies; some deaths come while the
// guest is suspended.
func TestKVMChaosKillsOfABusyLibvirtd(t *testing.T) {
	kills := check.Count(t, "FTCLOCK_LIBVIRTD_KILLS", 6)
	inChaos(t, func(t *testing.T, d *privatelibvirt.Domain, c *traffic) string {
		m := &mortal{c: c}
		c.loop(func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.suspend()
			time.Sleep(5 * time.Millisecond)
			m.resume()
		})
		for range 2 {
			c.loop(func() { m.virsh(commands[rand.IntN(len(commands))]...) })
		}
		c.floor = int64(kills)
		between := 0
		for i := range kills {
			time.Sleep(time.Duration(200+rand.IntN(300)) * time.Millisecond)
			if i%3 != 2 {
				check.NoError(t, m.restart())
				continue
			}
			between++
			m.mu.Lock()
			m.suspend()
			err := m.restart()
			m.resume()
			m.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
		}
		m.mu.Lock() // nobody is in a pause
		reconnect(t, d)
		m.mu.Unlock()
		if m.hits.Load() == 0 {
			t.Error("no command met a kill")
		}
		return fmt.Sprintf("%d kills of a busy libvirtd, %d of them in a suspend, %d commands cut short", kills, between, m.hits.Load())
	})
}

// The versions of the shims that were built.
var versions = []string{"one", "two"}

// installer gives what installs the shim of a version.
func installer(t *testing.T) (install func(version string)) {
	t.Helper()
	shims := map[string]string{}
	for version, name := range map[string]string{"one": built.ShimOne, "two": built.ShimTwo} {
		shims[version] = check.Value(built.Path(name))(t)
	}
	return func(v string) {
		t.Helper()
		text := check.Value(os.ReadFile(shims[v]))(t)
		next := installedShim + ".next"
		// A virsh that is started meanwhile would have the file open for writing until it is virsh, and a program that is can't be run.
		syscall.ForkLock.RLock()
		err := os.WriteFile(next, text, 0o755)
		syscall.ForkLock.RUnlock()
		check.NoError(t, err)
		check.NoError(t, os.Rename(next, installedShim))
	}
}

// upgrade has the domain's keeper go over to the installed version, and waits for it.
func upgrade(t *testing.T, d *privatelibvirt.Domain, version string) {
	t.Helper()
	s := whole(t, d)
	check.NoError(t, unix.Kill(s.Keeper, unix.SIGHUP))
	deadline := time.Now().Add(time.Minute)
	for next := whole(t, d); next.Version != version || next.Shim == s.Shim; next = whole(t, d) {
		if next.Keeper != s.Keeper || time.Now().After(deadline) {
			t.Fatalf("upgrading to %s: %+v", version, next)
		}
		time.Sleep(5 * time.Millisecond)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.Keeper))
	if err != nil || exe != installedShim {
		t.Fatalf("the keeper still runs %s: %v", exe, err)
	}
}

// Two programs take turns as the installed one.
func TestKVMChaosUpgradesInPlace(t *testing.T) {
	upgrades := check.Count(t, "FTCLOCK_UPGRADES", 4)
	install := installer(t)
	inChaos(t, func(t *testing.T, d *privatelibvirt.Domain, c *traffic) string {
		c.checkpoints(d.Suspend, d.Resume)
		c.commands()
		c.floor = int64(upgrades / 2)
		for i := range upgrades {
			time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
			install(versions[i%2])
			upgrade(t, d, versions[i%2])
		}
		return fmt.Sprintf("%d upgrades", upgrades)
	})
}

// The worker that saw the stop isn't the one that sees the cont, and the pause is caught up all the same.
func TestKVMUpgradeInsideAPause(t *testing.T) {
	install := installer(t)
	d, clock := start(t, managed("upgraded", patientElement))
	pause(t, d, 5*time.Millisecond) // takes the anchor
	for _, v := range versions {
		before, s0 := offset(t, clock), whole(t, d)
		check.NoError(t, d.Suspend())
		began := guest.Raw()
		install(v)
		upgrade(t, d, v)
		least := guest.Raw() - began
		check.NoError(t, d.Resume())
		s := status(t, d)
		r := s.Records[len(s.Records)-1]
		t.Logf("version %s in a pause of %v: %s, %s, ordered %v", v, time.Duration(r.Lost), r.Event, r.Decision, r.Ordered)
		if s.Pauses != s0.Pauses+1 || s.Dropped+s.Anchored != s0.Dropped+s0.Anchored+1 || s.State != control.Correcting || s.Disagreements != 0 {
			t.Errorf("status: %+v", withoutRecords(s))
		}
		// What it lasted is the module's to say: the new worker didn't see it begin.
		if r.Lost < least || r.Ordered != 1 || r.Event != clockpage.Checkpoint {
			t.Errorf("a pause of %d ns or more: %+v", least, r)
		}
		lostAsRecorded(t, clock, before, nil)
	}
	domaintest.NoBacksteps(t, clock)
}
