package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// Live migrations over TCP, in all the ways that libvirt has, have the same results with the shim as without: the guest
// lives on at the other end, or where it was when they fail. Its clock is what it would be had it stayed.
func TestKVMWaysToMigrate(t *testing.T) {
	// The destination of a post-copy migration needs userfaultfd(2), which the kernel gives to no unprivileged user.
	second, there := secondHost(t, `user = "root"`, `group = "root"`, `clear_emulator_capabilities = 0`,
		`dynamic_ownership = 0`)
	var without []string
	t.Run("without", func(t *testing.T) { without = waysToMigrate(t, second, there, "") })
	if t.Failed() {
		return
	}
	t.Run("with", func(t *testing.T) {
		for i, output := range waysToMigrate(t, second, there, clockElement) {
			t.Logf("without: %q, with: %q", without[i], output)
			if output != without[i] {
				t.Error("that is different")
			}
		}
	})
}

// waysToMigrate migrates a domain there and back and there again, and gives what virsh printed.
func waysToMigrate(t *testing.T, second *privatelibvirt.Second, there *libvirt.Connect, metadata string) (outputs []string) {
	x := managed("moving", metadata)
	// Something that takes its time, in which a few virsh have to start: 12 MiB that aren't zero, at 1 MiB/s.
	x.OS.Initrd = filepath.Join(privatelibvirt.Dir, "ballast")
	ballast := make([]byte, 12<<20)
	for i := range ballast {
		ballast[i] = byte(i/4096) | 1
	}
	check.NoError(t, os.WriteFile(x.OS.Initrd, ballast, 0o644))
	d, clock := start(t, x)
	endsThere(t, there, "moving")
	uuid := domaintest.UUID(t, d)
	whole := t // the clock of one migration is compared with the next one's
	events := watchEvents(t, "event", "--all", "--loop")
	thither := []string{"migrate", "moving", second.URI, "--live", "--migrateuri", "tcp://" + privatelibvirt.SecondAddress}
	hither := func(uri string) []string {
		return []string{"-c", second.URI, "migrate", "moving", uri, "--live", "--migrateuri", "tcp://" + privatelibvirt.FirstAddress}
	}

	// Two that fail after they have begun: the guest stays, and was never paused.
	for _, way := range []struct {
		name  string
		spoil func()
	}{
		{"cancelled", func() { mustVirsh(t, "domjobabort", "moving") }},
		{"the other QEMU dies", func() {
			check.NoError(t, unix.Kill(pidOn(t, second.Dir, "moving"), unix.SIGKILL))
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			before, seen := offset(t, clock), pausesOf(t, uuid, metadata)
			out, err := midMigration(t, append(thither, "--bandwidth", "1"), way.spoil)
			if err == nil {
				t.Errorf("it succeeded:\n%s", out)
			}
			if !strings.Contains(out, "job 'migration out'") { // libvirt hears of either in several ways at the same time
				t.Errorf("libvirt says %q", out)
			}
			awaitState(t, d, libvirt.DOMAIN_RUNNING)
			if pauses := pausesOf(t, uuid, metadata) - seen; pauses != 0 {
				t.Errorf("it was paused %d times", pauses)
			}
			lostAsRecorded(t, clock, before, nil)
			livesOn(t, d, clock, control.Dir, uuid, metadata != "")
			if _, err := there.LookupDomainByName("moving"); err == nil {
				t.Error("it is on the other host, too")
			}
		})
	}
	for _, way := range []struct {
		name string
		args []string
		conn *libvirt.Connect
		root string // where the files of the host that it comes to are
	}{
		{"plain", thither, there, second.Dir},
		{"p2p", append(hither(privatelibvirt.FirstURI), "--p2p"), conn, ""},
		{"post-copy", append(thither, "--postcopy", "--bandwidth", "1"), there, second.Dir},
		{"back again", hither(privatelibvirt.URI), conn, ""},
		{"p2p, post-copy", append(thither, "--p2p", "--postcopy", "--bandwidth", "1"), there, second.Dir},
		{"back once more", hither(privatelibvirt.URI), conn, ""},
		{"post-copy, held", append(thither, "--postcopy", "--bandwidth", "1"), there, second.Dir},
	} {
		t.Run(way.name, func(t *testing.T) {
			postcopy, held := strings.Contains(way.name, "post-copy"), strings.Contains(way.name, "held")
			from := privatelibvirt.URI
			if way.root == "" {
				from = second.URI
			}
			if metadata != "" {
				publish(t, second, from)
				if held {
					mustVirsh(t, "metadata", "moving", "urn:ftclock:domain:1", "--live", "--key", "ftclock", "--set", `<clock><on event="migrate" do="hold"/></clock>`)
				}
			}
			before := offset(t, clock)
			if !postcopy {
				out, err := virsh(way.args...)
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				outputs = append(outputs, out)
			} else {
				seen := strings.Count(events.text(), "Suspended Post-copy")
				out, err := midMigration(t, way.args, func() { mustVirsh(t, "migrate-postcopy", "moving") })
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				outputs = append(outputs, out)
				ended := func() int { return strings.Count(events.text(), "Suspended Post-copy") - seen }
				for end := time.Now().Add(3 * time.Minute); ended() < 1 && time.Now().Before(end); { // that virsh prints when it gets to it
					time.Sleep(50 * time.Millisecond)
				}
				if ended() != 1 {
					t.Errorf("it was no post-copy migration:\n%s", events.text())
				}
			}
			moved := domaintest.Lookup(t, way.conn, d.Name)
			clock = domaintest.ClockOfProcess(whole, pidOn(t, way.root, "moving"))
			livesOn(t, moved, clock, way.root+control.Dir, uuid, metadata != "")
			lost := offset(t, clock) - before
			t.Logf("the migration cost the guest's clock %d ns", lost)
			if metadata != "" {
				migrated(t, way.root+control.Dir, uuid, held)
			}
			if metadata != "" && !held && (lost > maxMigration || lost < -maxMigration) {
				t.Errorf("the migration cost the guest's clock %d ns", lost)
			}
			if (metadata == "" || held) && lost < int64(time.Millisecond) {
				t.Errorf("uncorrected it cost only %d ns, which isn't its downtime", lost)
			}
		})
		if t.Failed() {
			return outputs
		}
	}
	return outputs
}

// migrated checks by the record of the host that a guest has come to that it was taken for a migration, and caught up from the
// anchor that came with it, or held.
func migrated(t *testing.T, state, uuid string, held bool) {
	t.Helper()
	s := domaintest.StatusOf(t, state, uuid)
	if s.Pauses != uint64(len(s.Records)) {
		t.Fatalf("the record of the migration is gone: %d pauses, %d records", s.Pauses, len(s.Records))
	}
	r := s.Records[0]
	decision, reason := clockpage.Anchored, clockpage.FromImport
	if held {
		decision, reason = clockpage.Held, clockpage.ByThePolicy
	}
	t.Logf("%s, %s: %s; %v lost: %+v", r.Event, r.Decision, r.Reason, time.Duration(r.Lost), r)
	if r.Event != clockpage.Migrate || r.Decision != decision || r.Reason != reason ||
		held && r.WentOn != r.Saved || !held && r.WentOn <= r.Saved {
		t.Errorf("record: %+v", r)
	}
}

// pausesOf is how many pauses the domain's module has seen; 0 without one.
func pausesOf(t *testing.T, uuid, metadata string) uint64 {
	t.Helper()
	if metadata == "" {
		return 0
	}
	return domaintest.StatusOf(t, control.Dir, uuid).Pauses
}

// midMigration begins a migration, calls do in its middle, and gives what virsh says in the end.
func midMigration(t *testing.T, args []string, do func()) (string, error) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command("virsh", append([]string{"-c", privatelibvirt.URI}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	check.NoError(t, cmd.Start())
	check.Await(t, 3*time.Minute, 10*time.Millisecond, func() bool {
		info, _ := virsh("domjobinfo", args[1])
		return strings.Contains(info, "Data processed")
	}, "the migration's beginning")
	do()
	err := cmd.Wait()
	return strings.TrimSpace(out.String()), err
}

// livesOn checks that the guest can be used where it is, and that its clock is kept there if it is to be.
func livesOn(t *testing.T, d *privatelibvirt.Domain, clock *guest.Clock, state, uuid string, kept bool) {
	t.Helper()
	pause(t, d, sweepPause) // takes the anchor
	if _, err := clock.Sample(); err != nil {
		t.Error(err)
	}
	if !kept {
		return
	}
	before := offset(t, clock)
	pauses(t, d, 20, sweepPause)
	lostAsRecorded(t, clock, before, nil)
	domaintest.NoBacksteps(t, clock)
	if s := domaintest.StatusOf(t, state, uuid); s.State != control.Correcting || s.Disagreements != 0 || len(s.Warnings) != 0 && !unsynchronised() || s.Dropped+s.Anchored < 20 {
		t.Errorf("status: %+v", withoutRecords(s))
	}
}

// pidOn is the domain's QEMU on the host whose files are below root.
func pidOn(t *testing.T, root, name string) int {
	t.Helper()
	text := check.Value(os.ReadFile(root + "/run/libvirt/qemu/" + name + ".pid"))(t)
	return check.Value(strconv.Atoi(strings.TrimSpace(string(text))))(t)
}
