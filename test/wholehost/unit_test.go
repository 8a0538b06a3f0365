package wholehost

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/packages"
)

// unit is the unit of a domain's shim.
func (h *host) unit(name string) string {
	h.t.Helper()
	return "ftclock-shim@" + strings.TrimSpace(h.must("virsh", "domuuid", name)) + ".service"
}

// property is one of a unit's.
func (h *host) property(unit, name string) string {
	h.t.Helper()
	return strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", name, unit))
}

// storm has virsh ask for the domain's state again and again while the script, whose arguments are the domain and its unit, does something
// to the shim under checkpoints. Every command has to succeed; it gives how long the slowest of them took.
const storm = `set -u
domain=$1 unit=$2
ftclock exercise "$domain" --rate 40 --pause 5 --count 1000000 >/run/exercise 2>&1 & exercise=$!
(while [ ! -e /run/storm-ends ]; do
    before=${EPOCHREALTIME/[.,]/}
    virsh domstate "$domain" >/run/virsh.out 2>&1 || { echo "virsh failed: $(cat /run/virsh.out)"; break; }
    after=${EPOCHREALTIME/[.,]/}
    [ $((after - before)) -le $(cat /run/slowest) ] || echo $((after - before)) >/run/slowest
    sleep 0.1
done) & asks=$!
%s
touch /run/storm-ends
wait $asks
kill -0 $exercise || { echo "the checkpoints ended:"; cat /run/exercise; }
kill -INT $exercise
wait $exercise
echo "slowest $(cat /run/slowest)"`

func (h *host) underStorm(name, script string) (slowest time.Duration) {
	h.t.Helper()
	h.must("sh", "-c", "rm -f /run/storm-ends; echo 0 >/run/slowest")
	out := h.must("bash", "-c", fmt.Sprintf(storm, script), "storm", name, h.unit(name))
	said, last, ok := strings.Cut(out, "slowest ")
	us, err := strconv.Atoi(strings.TrimSpace(last))
	if !ok || err != nil || strings.TrimSpace(said) != "" {
		h.t.Errorf("under the storm: %s", out)
	}
	return time.Duration(us) * time.Microsecond
}

// served is a managed domain to whose shim a test does something.
type served struct {
	h          *host
	name, unit string
	qemu       string // its pid
	before     reading
}

// serve starts a managed domain, whose clock is kept.
func (h *host) serve(name string) *served {
	h.t.Helper()
	h.define(name)
	h.must("virsh", "start", name)
	s := &served{h: h, name: name, unit: h.unit(name)}
	h.keepTime([]string{name}, 20)
	s.before = h.read([]string{name})[name]
	s.qemu = s.pid()
	return s
}

func (s *served) pid() string {
	s.h.t.Helper()
	return s.h.must("cat", "/run/libvirt/qemu/"+s.name+".pid")
}

// whole waits until the unit runs, and checks that the domain lives.
func (s *served) whole(after string) {
	s.h.t.Helper()
	s.h.eventually("the unit being up after "+after, func() bool { return s.h.property(s.unit, "SubState") == "running" })
	if now := s.pid(); now != s.qemu {
		s.h.t.Fatalf("after %s QEMU is %s, was %s", after, now, s.qemu)
	}
	s.h.must("virsh", "domstate", s.name)
}

// ends checks that the clock is where it was at first, and destroys the domain.
func (s *served) ends() {
	s.h.t.Helper()
	s.h.keepTime([]string{s.name}, 20)
	drift := s.h.read([]string{s.name})[s.name].offset - s.before.offset
	s.h.t.Logf("drift of %d ns after all that", drift)
	check.Within(s.h.t, drift, guest.MaxDrift, "drift after all that")
	s.h.must("virsh", "destroy", s.name)
	s.h.eventually("the unit's end", func() bool { return s.h.property(s.unit, "ActiveState") == "inactive" })
}

// Whatever ends a shim, systemd holds its descriptors and starts it again: no command fails, and the guest loses nothing.
// FTCLOCK_UNIT_KILLS is how often all of the unit is killed, and has the long form.
func TestKVMNothingEndsTheUnit(t *testing.T) {
	kills, long := check.Count(t, "FTCLOCK_UNIT_KILLS", 6), os.Getenv("FTCLOCK_UNIT_KILLS") != ""
	h := boot(t)
	web1 := h.serve("web1")
	unit, whole := web1.unit, web1.whole
	if pid, group := h.property(unit, "MainPID"), h.must("sh", "-c", "cat /sys/fs/cgroup$(systemctl show --value -p ControlGroup "+unit+")/cgroup.procs"); pid != strings.TrimSpace(group) {
		t.Errorf("in the unit's control group: %q; its main process is %s", group, pid)
	}
	descriptors := func() int {
		n, _ := strconv.Atoi(strings.TrimSpace(h.must("sh", "-c", "ls /proc/"+h.property(unit, "MainPID")+"/fd | wc -l")))
		return n
	}
	h.must("systemctl", "kill", "-s", "KILL", unit) // the first has a little more open
	whole("the first kill")
	first, stored := descriptors(), h.property(unit, "NFileDescriptorStore")

	began := time.Now()
	slowest := h.underStorm("web1", fmt.Sprintf(`for i in $(seq %d); do
    sleep $((RANDOM %% 2)).$((RANDOM %% 10))
    systemctl kill -s KILL "$unit" || echo "kill $i fails"
done`, kills))
	t.Logf("%d kills of the unit in %.0f s; the slowest virsh took %v", kills, time.Since(began).Seconds(), slowest)
	whole("the kills")

	// systemd itself is busy meanwhile, on an emulated host for half a minute: no pause waits for it.
	for _, command := range []string{"daemon-reexec", "daemon-reload", "restart libvirtd"} {
		if !long && command != "daemon-reexec" {
			continue
		}
		h.must("sh", "-c", "systemctl kill -s KILL "+unit+"; systemctl "+command+"; systemctl kill -s KILL "+unit)
		whole(command)
	}
	h.underStorm("web1", "sleep 2")
	if now, kept := descriptors(), h.property(unit, "NFileDescriptorStore"); now > first || kept != stored {
		t.Errorf("the shim has %d descriptors open and systemd holds %s, at first %d and %s", now, kept, first, stored)
	}

	// In place: the same process, and never another state of the unit.
	for _, verb := range []string{"stop", "restart"} {
		if out, err := h.Run("systemctl", verb, unit); err == nil || !strings.Contains(out, "refused") {
			t.Errorf("systemctl %s: %v: %s", verb, err, out)
		}
	}
	pid, restarts := h.property(unit, "MainPID"), h.property(unit, "NRestarts")
	h.must("cp", tools+"/"+built.ShimTwo, "/usr/sbin/.new")
	h.must("mv", "/usr/sbin/.new", "/usr/sbin/ftclock-shim")
	h.underStorm("web1", `systemctl reload "$unit" || echo "reload fails"`)
	if out := h.must("journalctl", "--no-pager", "-u", unit, "-g", "version=two"); !strings.Contains(out, "ready") {
		t.Errorf("after a reload: %s", out)
	}
	h.must("sh", "-c", "printf '#!/bin/sh\\nexit 5\\n' >/usr/sbin/.new && chmod 755 /usr/sbin/.new && cp /usr/sbin/ftclock-shim /root/good && mv /usr/sbin/.new /usr/sbin/ftclock-shim")
	if out, err := h.Run("systemctl", "reload", unit); err == nil {
		t.Errorf("a reload with a program that doesn't run succeeds: %s", out)
	}
	h.must("cp", "/root/good", "/usr/sbin/.new")
	h.must("mv", "/usr/sbin/.new", "/usr/sbin/ftclock-shim")
	h.underStorm("web1", `dpkg -i `+tools+`/packages/`+packages.DebName(packages.Tags[1])+` >/run/dpkg 2>&1 || { echo "the upgrade fails:"; cat /run/dpkg; }
sleep 1`)
	whole("an upgrade of the package")
	if now, again := h.property(unit, "MainPID"), h.property(unit, "NRestarts"); now != pid || again != restarts {
		t.Errorf("upgrades: the main process is %s and was %s, restarts %s and %s", now, pid, again, restarts)
	}
	web1.ends()
	if result := h.property(unit, "Result"); result != "success" {
		t.Errorf("the unit ended with %s", result)
	}
	if left := h.must("sh", "-c", "ls -A /run/ftclock; ls -d /var/lib/libvirt/qemu/domain-* 2>/dev/null || true"); strings.TrimSpace(left) != "" {
		t.Errorf("left: %s", left)
	}
}

// systemd-oomd kills the whole of a unit whose memory is short, and systemd notes another end than a kill's. It leaves the shim
// alone; where somebody has it kill shims all the same, one is started again like after any other end.
func TestKVMOomdEndsNothing(t *testing.T) {
	h := newHost(t, "systemd-oomd")
	h.plug()
	h.install()
	h.must("sh", "-c", `mkdir -p /etc/systemd/oomd.conf.d
printf '[OOM]\nDefaultMemoryPressureDurationSec=1s\n' >/etc/systemd/oomd.conf.d/soon.conf
systemctl restart systemd-oomd`)
	web1 := h.serve("web1")
	unit := web1.unit
	killed := func() int {
		return strings.Count(h.must("journalctl", "--no-pager", "-u", "systemd-oomd"), unit+" due to memory pressure")
	}
	// A few pages are all that the unit may keep, so that it waits for memory most of the time.
	const short = `systemctl set-property --runtime "$unit" ManagedOOMMemoryPressure=kill ManagedOOMMemoryPressureLimit=1%% MemoryHigh=1M ManagedOOMPreference=%s
`
	const enough = `
systemctl set-property --runtime "$unit" ManagedOOMMemoryPressure=auto MemoryHigh=infinity`

	slowest := h.underStorm("web1", fmt.Sprintf(short, "omit")+"sleep 20; cat /sys/fs/cgroup$(systemctl show --value -p ControlGroup $unit)/memory.pressure >/run/pressure"+enough)
	t.Logf("as it comes, short of memory for 20 s: killed %d times, the slowest virsh took %v\n%s", killed(), slowest, h.must("cat", "/run/pressure"))
	if n := killed(); n != 0 {
		t.Errorf("oomd killed it %d times, which the unit asks it not to", n)
	}

	restarts := h.property(unit, "NRestarts")
	slowest = h.underStorm("web1", fmt.Sprintf(short, "none")+`for i in $(seq 300); do
    ! journalctl --no-pager -u systemd-oomd | grep -q "$unit due to memory pressure" || break
    sleep 1
done`+enough)
	n := killed()
	t.Logf("oomd killed it %d times; the slowest virsh took %v", n, slowest)
	if n == 0 {
		t.Fatalf("oomd killed nothing:\n%s", h.must("journalctl", "--no-pager", "-u", "systemd-oomd"))
	}
	h.eventually("the unit being started again", func() bool { return h.property(unit, "NRestarts") != restarts })
	web1.whole("oomd's kill")
	web1.ends()
}
