package wholehost

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
)

// written bounds, in ns, by how much a clock may be off that was written in a migration, and what was measured around it: emulated
// hosts have both take ten times as long.
const written = 300_000

// A domain that is migrated between two hosts, each of which has a clock of its own, and back, goes on by the clock of the host
// that it comes to: it is off by what the two hosts' clocks are apart, by no more than its record says, and never sees time go
// back. Between hosts whose clocks agree it isn't off.
func TestKVMTwoHosts(t *testing.T) {
	one, two := newHost(t), newHost(t)
	cable := t.TempDir()
	var errs [2]error
	var up sync.WaitGroup
	for end, h := range []*host{one, two} {
		h.options.Cable, h.options.End = cable, end
		up.Go(func() { errs[end] = h.up() })
	}
	up.Wait()
	check.NoError(t, errors.Join(errs[:]...))
	hosts := one.options.Address() + " one\n" + two.options.Address() + " two\n"
	one.join("one", hosts)
	two.join("two", hosts)
	one.define("web1")
	one.must("virsh", "start", "web1")
	one.keepTime([]string{"web1"}, 20)
	for _, c := range []struct {
		name  string
		apart time.Duration // by how much the second host's clock is ahead
		bound time.Duration // which both hosts claim; 0: nobody keeps the second one's clock
	}{
		{"equal", 0, 10 * time.Millisecond},
		{"second ahead", 50 * time.Millisecond, 40 * time.Millisecond},
		{"second behind", -50 * time.Millisecond, 40 * time.Millisecond},
		{"second not synchronised", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer func(all *testing.T) { one.t, two.t = all, all }(one.t)
			one.t, two.t = t, t
			one.must(tools+"/walltime", "set", "0", strconv.FormatInt(max(c.bound, 10*time.Millisecond).Microseconds(), 10))
			ahead, _ := one.ask(two)
			two.must(tools+"/walltime", "set", strconv.FormatInt(int64(c.apart)-ahead, 10), strconv.FormatInt(c.bound.Microseconds(), 10))
			one.migrate("web1", two, c.bound == 0)
			two.migrate("web1", one, c.bound == 0, "--p2p")
		})
	}
}

// join gives a host its name among the hosts, and lets others migrate to its libvirt.
func (h *host) join(name, hosts string) {
	h.t.Helper()
	h.install()
	for path, text := range map[string]string{
		"/etc/hosts":                 hosts,
		"/etc/libvirt/libvirtd.conf": "auth_tcp = \"none\"\n",
	} {
		if out, err := h.Feed([]byte(text), "sh", "-c", "cat >>$0", path); err != nil {
			h.t.Fatalf("%v\n%s", err, out)
		}
	}
	h.must("sh", "-c", "echo $0 >/etc/hostname && hostname $0", name)
	h.must("systemctl", "stop", "libvirtd.service", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket")
	h.must("systemctl", "start", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd-tcp.socket", "libvirtd.service")
	h.must("systemd-run", "--quiet", tools+"/walltime", "serve")
}

// ask measures how far another host's clock is ahead of this one's, and to within what, in ns.
func (h *host) ask(other *host) (ahead, within int64) {
	h.t.Helper()
	check.Value(fmt.Sscan(h.must(tools+"/walltime", "ask", other.options.Address()), &ahead, &within))(h.t)
	return ahead, within
}

// behind is how far the domain's clock is behind the host's CLOCK_REALTIME, in ns.
func (h *host) behind(name string) int64 {
	h.t.Helper()
	r := h.read([]string{name})[name]
	return r.offset + r.realtime
}

// migrate migrates a domain under checkpoints to another host, and checks its clock there.
func (h *host) migrate(name string, to *host, unsynchronised bool, way ...string) {
	h.t.Helper()
	h.exercise(name)
	h.must("ftclock", "anchor", "publish")
	before := h.behind(name)
	args := append([]string{"virsh", "migrate", "--live", "--persistent", "--undefinesource"}, way...)
	h.must(append(args, name, "qemu+tcp://"+to.options.Address()+"/system")...)
	after := to.behind(name)
	ahead, within := h.ask(to)
	to.exercise(name)
	settled := to.behind(name)

	s := to.status(name)
	arrival := s.Records[0]
	lacks, truly := after-before, after-before-ahead // by the clock of its new host, and by that of the old one
	h.t.Logf("to %s %v: its clock %.3f ms ahead (+-%.3f); the guest lacks %.3f ms by it and %.3f ms by the old host's, %.3f after checkpoints; %+v; warnings %q",
		strings.TrimSpace(to.must("hostname")), way, ms(ahead), ms(within), ms(lacks), ms(truly), ms(settled-before), arrival, s.Warnings)
	if arrival.Event != clockpage.Migrate {
		h.t.Errorf("its first record there is of the event %s", arrival.Event)
	}
	// A host whose clock is behind by more than the guest was away doesn't set it back.
	least := int64(-written)
	if ahead < 0 && arrival.Decision != clockpage.Anchored {
		least += ahead
	}
	for what, d := range map[string]int64{"right after its arrival": lacks, "after checkpoints": settled - before} {
		if d > written || d < least {
			h.t.Errorf("%s the guest lacks %.3f ms by its new host's clock", what, ms(d))
		}
	}
	if most := int64(arrival.Error) + within + written; truly > most || truly < -most {
		h.t.Errorf("the guest lacks %.3f ms by its old host's clock; its record says within %.3f", ms(truly), ms(int64(arrival.Error)))
	}
	if said := strings.Contains(strings.Join(s.Warnings, "; "), "synchronised"); said != unsynchronised {
		h.t.Errorf("the warnings are %q", s.Warnings)
	}
}

// status is what ftclock tells of a domain, its records since it came.
func (h *host) status(name string) control.Status {
	h.t.Helper()
	var all []control.Status
	text := h.must("ftclock", "status", name, "--format", "json", "--records", "256")
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 || len(all[0].Records) == 0 {
		h.t.Fatalf("%v: %s", err, text)
	}
	return all[0]
}

func ms(ns int64) float64 { return float64(ns) / 1e6 }

// exercise makes some checkpoints.
func (h *host) exercise(name string) {
	h.t.Helper()
	h.must("ftclock", "exercise", name, "--rate", "20", "--pause", "5", "--count", "20")
}
