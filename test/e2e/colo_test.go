package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
	metadata "ftclock/xml-templates"
)

// coloSecondary is the policy of a COLO secondary: every checkpoint is a state that is loaded over a guest that ran on.
const coloSecondary = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="restore" do="catch-up"/></ftclock:clock>`

// envCOLO is how long COLO runs at each checkpoint delay, in seconds.
const envCOLO = "FTCLOCK_COLO_SECONDS"

// QEMU's own checkpointing engine, COLO: it pauses its guest from inside, so that no cont comes over any monitor, and
// loads every checkpoint into a second QEMU. Then the first one is killed, and the second goes on.
func TestKVMCOLO(t *testing.T) {
	length, delays := time.Duration(check.Count(t, envCOLO, 12))*time.Second, []int{100}
	if os.Getenv(envCOLO) != "" {
		delays = []int{20, 100, 500}
	}
	var courses []*course
	for i, delay := range delays {
		c := &course{delay: delay}
		courses = append(courses, c)
		t.Run(fmt.Sprintf("a delay of %d ms", delay), func(t *testing.T) { colo(t, 7465+i, length, c) })
	}
	drawCourses(t, courses)
}

func colo(t *testing.T, port int, length time.Duration, c *course) {
	address := "127.0.0.1:" + strconv.Itoa(port)
	x := managed("colo-secondary", coloSecondary)
	privatelibvirt.AddArguments(x, "-incoming", "tcp:"+address)
	secondary := define(t, x)
	check.NoError(t, secondary.Create())
	primary, clock := start(t, managed("colo-primary", clockElement))
	t.Cleanup(func() { _ = secondary.Destroy() }) // before what is left of the primary is looked for
	monitor := func(d *privatelibvirt.Domain, command string) {
		t.Helper()
		mustVirsh(t, "qemu-monitor-command", d.Name, command)
	}
	const colo = `{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-colo","state":true}]}}`
	monitor(secondary, colo)
	monitor(primary, colo)
	monitor(primary, fmt.Sprintf(`{"execute":"migrate-set-parameters","arguments":{"x-checkpoint-delay":%d}}`, c.delay))
	// One pause before it all, for the anchor, which then goes to the secondary.
	pause(t, primary, 5*time.Millisecond)
	importChanged(t, ftclock(t, "anchor", "export", primary.Name), secondary.Name, nil, "")
	before := offset(t, clock)
	monitor(primary, `{"execute":"migrate","arguments":{"uri":"tcp:`+address+`"}}`)
	c.began = time.Now()
	for end := c.began.Add(length); time.Now().Before(end); time.Sleep(time.Until(end) % (length / 60)) {
		c.look(t, clock, before)
	}

	drift := offset(t, clock) - before
	s := status(t, primary)
	t.Logf("primary: drift of %d ns after %d checkpoints, %d dropped, %d anchored, worst residual %d ns", drift, s.Pauses, s.Dropped, s.Anchored, s.WorstResidual)
	if int(s.Pauses) < int(length/time.Second) {
		t.Errorf("only %d checkpoints: COLO doesn't run", s.Pauses)
	}
	check.Within(t, drift, maxDrift, "the primary's drift")
	domaintest.NoBacksteps(t, clock)

	pid := domaintest.PID(t, primary)
	check.NoError(t, unix.Kill(pid, unix.SIGKILL))
	c.died = time.Since(c.began).Seconds()
	monitor(secondary, `{"execute":"x-colo-lost-heartbeat"}`)
	second := domaintest.Clock(t, secondary)
	drift = offset(t, second) - before
	s = status(t, secondary)
	last := s.Records[len(s.Records)-1]
	t.Logf("secondary: off by %d ns after %d checkpoints and the failover, %d anchored; at last %s, %s: %s", drift, s.Pauses, s.Anchored,
		last.Event, last.Decision, last.Reason)
	check.Within(t, drift, maxDrift, "the secondary's guest is off")
	if int(s.Anchored) < int(length/time.Second) {
		t.Errorf("only %d of the secondary's checkpoints were caught up", s.Anchored)
	}
	domaintest.NoBacksteps(t, second)
	// It is a guest like any other now.
	for range 20 {
		pause(t, secondary, 5*time.Millisecond)
		c.look(t, second, before)
	}
	check.Within(t, offset(t, second)-before, maxDrift, "the secondary's guest is off after 20 pauses more")
	domaintest.NoBacksteps(t, second)
}

// statusOf asks the shim of an attached QEMU.
func statusOf(t *testing.T, pid string) *control.Status {
	t.Helper()
	infos := check.Value(control.List(control.Dir))(t)
	for _, info := range infos {
		if strings.HasPrefix(info.UUID, "pid-"+pid+"-") {
			return domaintest.StatusOf(t, control.Dir, info.UUID)
		}
	}
	t.Fatalf("no shim serves process %s", pid)
	return nil
}

// importChanged gives a QEMU an export as another host would have made it, which it returns: integers are changed by so much, other
// members to that value, and boot is another boot's id.
func importChanged(t *testing.T, export, to string, change map[string]any, boot string) (given metadata.Anchor) {
	t.Helper()
	fields := map[string]any{}
	decoder := json.NewDecoder(strings.NewReader(export))
	decoder.UseNumber()
	check.NoError(t, decoder.Decode(&fields))
	for name, by := range change {
		n, isNumber := by.(int64)
		if !isNumber {
			fields[name] = by
			continue
		}
		was := check.Value(fields[name].(json.Number).Int64())(t)
		fields[name] = was + n
	}
	if boot != "" {
		fields["boot_id"] = boot
	}
	text := check.Value(json.Marshal(fields))(t)
	check.NoError(t, json.Unmarshal(text, &given))
	c := ftclockCommand("anchor", "import", to)
	c.Stdin = bytes.NewReader(text)
	check.Output(t, c)
	return given
}
