package shim

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/record"
	"ftclock/relay"
	metadata "ftclock/xml-templates"
)

func TestCompare(t *testing.T) {
	const ms = uint64(time.Millisecond)
	seen := pauseSeen{stopSent: 100 * ms, stopEvent: 102 * ms, contCame: 150 * ms, number: 1}
	byQEMU := pauseSeen{stopEvent: 102 * ms, contCame: 150 * ms, number: 1}
	record := func(stop, cont uint64) clockpage.Record {
		return clockpage.Record{StopRaw: stop * ms, ContRaw: cont * ms, Lost: int64(cont-stop) * int64(ms)}
	}
	for name, c := range map[string]struct {
		record clockpage.Record
		seen   pauseSeen
		want   string
	}{
		"in bounds":                                 {record(101, 151), seen, ""},
		"at the bounds":                             {record(100, 160), seen, ""},
		"the cont before it came":                   {record(101, 149), seen, "before"},
		"the cont after its answer":                 {record(101, 161), seen, "after"},
		"longer than from the stop":                 {record(80, 155), seen, "there were only"},
		"shorter than from the STOP event":          {record(110, 151), seen, "there were already"},
		"read again in a pause of QEMU's own":       {record(110, 151), byQEMU, ""},
		"longer, but nobody knows when it began":    {record(50, 151), byQEMU, ""},
		"loaded while the guest was paused already": {clockpage.Record{ContRaw: 1}, seen, ""},
	} {
		got := compare(c.record, c.seen, 160*ms)
		if c.want == "" && got != "" || c.want == "there were only" && !strings.Contains(got, c.want) ||
			c.want == "there were already" && !strings.Contains(got, c.want) || c.want != "" && got == "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestJudge(t *testing.T) {
	p := metadata.Default()
	p.Suspend = metadata.Rule{Do: metadata.CatchUp, Limit: time.Minute}
	for lost, want := range map[time.Duration]clockpage.Event{
		time.Millisecond: clockpage.Checkpoint, p.Checkpoint.Limit: clockpage.Checkpoint,
		p.Checkpoint.Limit + 1: clockpage.Suspend, time.Hour: clockpage.Suspend,
	} {
		if event, do := judge(&p, lost); event != want || do != clockpage.CatchUp {
			t.Errorf("%v: %v, %v", lost, event, do)
		}
	}
	p.Suspend.Do = metadata.Hold
	if _, do := judge(&p, time.Hour); do != clockpage.Hold {
		t.Errorf("a suspend that is to be held: %v", do)
	}
}

// The log has a line an event, never one a pause.
func TestALineAnEvent(t *testing.T) {
	var log strings.Builder
	d := &domain{log: zerolog.New(&log), save: func(memory) {}}
	for range 1000 {
		d.disagree("so and so")
		d.warn("this")
		d.warn("that")
	}
	if n := strings.Count(log.String(), "\n"); n != 4+2 || len(d.warnings) != 2 || d.disagreements != 1000 {
		t.Errorf("%d lines, %d warnings, %d disagreements:\n%s", n, len(d.warnings), d.disagreements, log.String())
	}
}

// Whoever waits for a stop's answer doesn't wait for a look at the metadata; one that nobody sent through the relay has no answer.
func TestLooksBehindTheAnswer(t *testing.T) {
	looks := 0
	d := &domain{log: zerolog.Nop(), save: func(memory) {}, look: func() { looks++ }}
	for i, step := range []struct {
		what func()
		want int
	}{
		{func() { d.Command(relay.Message{Execute: "stop", ID: `"libvirt-1"`}) }, 0},
		{func() { d.FromQEMU(relay.Message{Event: "STOP"}) }, 0},
		{func() { d.FromQEMU(relay.Message{Answer: true, ID: `"libvirt-0"`}) }, 0},
		{func() { d.FromQEMU(relay.Message{Answer: true, ID: `"libvirt-1"`}) }, 1},
		{func() { d.FromQEMU(relay.Message{Answer: true, ID: `"libvirt-1"`}) }, 1},
		{func() { d.FromQEMU(relay.Message{Event: "RESUME"}) }, 1},
		{func() { d.FromQEMU(relay.Message{Event: "STOP"}) }, 2},
		{func() { d.FromQEMU(relay.Message{Event: "RESUME"}) }, 2},
		{func() { d.Command(relay.Message{Execute: "stop"}) }, 2},
		{func() { d.FromQEMU(relay.Message{Event: "STOP"}) }, 3},
	} {
		if step.what(); looks != step.want {
			t.Fatalf("step %d: %d looks, want %d", i, looks, step.want)
		}
	}
}

// A cont is held while it could be refused, and until an attempt to load the module has ended, whatever its end was.
func TestWhenAContIsHeld(t *testing.T) {
	for _, gate := range []bool{false, true} {
		for _, fails := range []bool{false, true} {
			d, err := newDomain(zerolog.Nop(), memory{Clock: byDefault, Gate: gate}, func(memory) {})
			if err != nil {
				t.Fatal(err)
			}
			loaded, ended := make(chan struct{}), make(chan struct{})
			d.load = func() {
				if !fails {
					d.mu.Lock()
					_, d.page = newPage(t, clockpage.Minor)
					d.mu.Unlock()
				}
				close(loaded)
				<-ended
			}
			check := func(when string, want bool) {
				t.Helper()
				if d.Holds() != want {
					t.Errorf("gate %v, the attempt fails %v, %s: held %v", gate, fails, when, !want)
				}
			}
			check("before an attempt", true)
			d.FromQEMU(relay.Message{Greeting: true})
			<-loaded
			check("while it isn't over", true)
			close(ended)
			<-d.loading
			check("after it", gate)
			d.Cont(relay.Message{Execute: "cont", ID: "1"})
			check("after a cont", gate && fails)
		}
	}
}

// A snapshot that QEMU is told to load before it ever ran is carried on from what is known of its guest, and the first cont waits
// for that; also in a worker that finds the module loaded.
func TestASnapshotIsLoadedAtTheStart(t *testing.T) {
	for _, taken := range []bool{false, true} {
		for _, ran := range []bool{false, true} {
			saved := memory{}
			d, err := newDomain(zerolog.Nop(), memory{Clock: byDefault}, func(m memory) { saved = m })
			if err != nil {
				t.Fatal(err)
			}
			f, page := newPage(t, clockpage.Minor)
			if ran {
				write(t, f, atCounts, 1)
			}
			d.load = func() {
				d.mu.Lock()
				d.page = page
				d.mu.Unlock()
			}
			entered, leave := make(chan struct{}, 2), make(chan struct{})
			d.importState = func(*clockpage.Page) {
				entered <- struct{}{}
				<-leave
			}
			if taken {
				d.resume(page, true)
			} else {
				d.FromQEMU(relay.Message{Greeting: true})
				<-d.loading
			}
			d.Command(relay.Message{Execute: "snapshot-load", ID: "1"})
			d.Command(relay.Message{Execute: "snapshot-load", ID: "2"})
			if ran {
				if d.Holds() || saved.Loads {
					t.Errorf("taken over %v: a QEMU that ran already is taken for one that begins", taken)
				}
				close(leave)
				continue
			}
			<-entered
			if !d.Holds() || !saved.Loads {
				t.Errorf("taken over %v: held %v, saved %v", taken, d.Holds(), saved.Loads)
			}
			close(leave)
			if refusal := d.Cont(relay.Message{Execute: "cont", ID: "3"}); refusal != "" || d.Holds() || len(entered) > 0 {
				t.Errorf("taken over %v: refusal %q, held %v, once more %v", taken, refusal, d.Holds(), len(entered) > 0)
			}
		}
	}
}

// A guest that somebody else resumed runs: a cont of it is never refused, as it is before it ever ran.
func TestNoContOfARunningGuestIsRefused(t *testing.T) {
	for _, ran := range []bool{false, true} {
		saved := memory{Gate: true}
		d, err := newDomain(zerolog.Nop(), memory{Clock: byDefault, Gate: true}, func(m memory) { saved = m })
		if err != nil {
			t.Fatal(err)
		}
		d.load = func() { d.loaded(nil, "", errors.New("no module")) }
		d.FromQEMU(relay.Message{Greeting: true})
		<-d.loading
		if ran {
			d.FromQEMU(relay.Message{Event: "RESUME"})
			d.FromQEMU(relay.Message{Event: "STOP"})
		}
		if refusal := d.Cont(relay.Message{Execute: "cont", ID: "1"}); (refusal == "") != ran || saved.Gate == ran {
			t.Errorf("ran %v: refusal %q, gate %v", ran, refusal, saved.Gate)
		}
	}
}

// While QEMU is busy, the first cont waits where it would be refused, and the start succeeds, if late. Elsewhere it goes on, and
// the guest is served once it can be.
func TestAContWaitsForABusyQEMU(t *testing.T) {
	patience := contWait
	contWait = 20 * time.Millisecond
	defer func() { contWait = patience }()
	for clock, waits := range map[string]bool{
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`:               true,
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="no"/>`: false,
	} {
		d, err := newDomain(zerolog.Nop(), memory{Clock: clock, Gate: true}, func(memory) {})
		if err != nil {
			t.Fatal(err)
		}
		idle := make(chan struct{})
		_, page := newPage(t, clockpage.Minor)
		d.load = func() {
			d.busy(errors.New("main thread is never idle"))
			<-idle
			d.loaded(page, "ptrace", nil)
		}
		d.FromQEMU(relay.Message{Greeting: true})
		said := make(chan string, 1)
		go func() { said <- d.Cont(relay.Message{Execute: "cont", ID: "1"}) }()
		select {
		case refusal := <-said:
			if waits || refusal != "" {
				t.Errorf("%s: the cont doesn't wait: %q", clock, refusal)
			}
		case <-time.After(50 * contWait):
			if !waits {
				t.Errorf("%s: the cont waits", clock)
			}
		}
		close(idle)
		<-d.loading
		if waits {
			if refusal := <-said; refusal != "" {
				t.Errorf("%s: %s", clock, refusal)
			}
		}
		if d.mu.Lock(); d.state != control.Correcting || d.isBusy {
			t.Errorf("%s: it is %s", clock, d.state)
		}
		d.mu.Unlock()
	}
}

// A loader that never ends holds a cont for so long and no longer, whatever the policy requires.
func TestAContWaitsBounded(t *testing.T) {
	patience := contWait
	contWait = 20 * time.Millisecond
	defer func() { contWait = patience }()
	for clock, refused := range map[string]bool{
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`:               true,
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="no"/>`: false,
	} {
		d, err := newDomain(zerolog.Nop(), memory{Clock: clock, Gate: true}, func(memory) {})
		if err != nil {
			t.Fatal(err)
		}
		hung := make(chan struct{})
		d.load = func() { <-hung }
		said := make(chan string, 1)
		go func() { said <- d.Cont(relay.Message{Execute: "cont", ID: "1"}) }()
		select {
		case refusal := <-said:
			if (refusal != "") != refused || len(d.warnings) != 1 {
				t.Errorf("%s: refusal %q, warnings %q", clock, refusal, d.warnings)
			}
		case <-time.After(2 * time.Minute):
			t.Errorf("%s: the cont waits for ever", clock)
		}
		close(hung)
	}
}

// A change is logged once, however often it is asked for.
func TestAPolicyIsLoggedWhenItChanges(t *testing.T) {
	var logged bytes.Buffer
	d, err := newDomain(zerolog.New(&logged), memory{Clock: byDefault}, func(memory) {})
	if err != nil {
		t.Fatal(err)
	}
	_, page := newPage(t, clockpage.Minor)
	d.resume(page, true)
	again, err := metadata.ParseElement([]byte(byDefault))
	if err != nil {
		t.Fatal(err)
	}
	d.setPolicy(&again)
	if logged.Len() > 0 {
		t.Errorf("the same policy: %s", &logged)
	}
	for range 3 {
		d.setPolicy(nil)
	}
	d.setPolicy(&again)
	if got := strings.Count(logged.String(), "policy changed"); got != 2 {
		t.Errorf("logged %d times:\n%s", got, &logged)
	}
}

// A libvirt that doesn't read is told of once. Meanwhile no message wakes the recorder, which looks by itself.
func TestALibvirtThatDoesNotRead(t *testing.T) {
	d := testDomain(t, byDefault)
	d.recorder = newRecorder(d, false, record.Config{})
	for range 2 {
		d.Unread(true)
		if !d.recorder.alone.Load() {
			t.Error("the recorder waits for messages that nobody reads")
		}
		d.Unread(false)
	}
	if len(d.warnings) != 1 || !strings.Contains(d.warnings[0], "libvirt doesn't read") || d.recorder.alone.Load() {
		t.Errorf("warnings %q, alone %t", d.warnings, d.recorder.alone.Load())
	}
}
