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

// An order says when the pause was and for how long, whatever the policy makes of that. What is done is for the module to judge.
func TestAnOrderLeavesTheJudgementToTheModule(t *testing.T) {
	for _, clock := range []string{byDefault, strings.Replace(byDefault, "/>", `><ftclock:on event="checkpoint" do="hold" limit="1ms"/></ftclock:clock>`, 1)} {
		for _, seen := range []pauseSeen{{stopSent: 70e9, stopEvent: 71e9}, {stopSent: 70e9}, {}} {
			f, page := newPage(t, clockpage.Minor)
			write(t, f, atNow, 2|1<<32, 9) // the guest is paused, for the ninth time
			d := testDomain(t, clock)
			d.resume(page, true)
			d.pause = seen
			if refusal := d.Cont(relay.Message{Execute: "cont", ID: "1"}); refusal != "" || !d.pause.ordered {
				t.Fatalf("refusal %q, ordered %v", refusal, d.pause.ordered)
			}
			stop, lost := max(seen.stopEvent, seen.stopSent), uint64(0)
			if stop != 0 {
				lost = d.pause.contCame - stop
			}
			order, err := page.Order()
			if err != nil || order.Pause != 9 ||
				order.StopRaw != stop || order.ContRaw != d.pause.contCame || order.Lost != lost {
				t.Errorf("%s, %+v: %+v, %v", clock, seen, order, err)
			}
		}
	}
}

// An attempt for which a cont was refused, since it took too long, may end after the next one has begun, and spoils nothing of it.
func TestAnAttemptThatNobodyWaitsForAnyMore(t *testing.T) {
	impatient(t, time.Millisecond)
	for _, arrives := range []bool{false, true} {
		d := domainOf(t, memory{Clock: byDefault, Gate: true}, zerolog.Nop(), func(memory) {})
		_, page := newPage(t, clockpage.Minor)
		answers := make(chan heard, 2)
		ends := []chan struct{}{make(chan struct{}), make(chan struct{})}
		attempts := 0
		d.load = func(answer heard) {
			end := ends[attempts]
			attempts++
			answers <- answer
			<-end
		}
		if refusal := d.Cont(relay.Message{Execute: "cont"}); !strings.Contains(refusal, "took longer") {
			t.Fatalf("refusal %q", refusal)
		}
		first := <-answers
		if v := d.view(); v.state != control.Starting {
			t.Errorf("after it: %s", v.state)
		}
		d.module.begin(false)
		second := <-answers
		if arrives {
			first(page, "ptrace", nil)
		} else {
			first(nil, "", errors.New("too late"))
		}
		close(ends[0])
		if v := d.view(); !d.Holds() || (v.state == control.Uncorrected) == arrives || (v.page != nil) != arrives {
			t.Errorf("it arrives %v: %s, held %v", arrives, v.state, d.Holds())
		}
		second(page, "ptrace", nil)
		close(ends[1])
		settle(d)
		if v := d.view(); v.state != control.Correcting || v.why != "" || d.Cont(relay.Message{Execute: "cont"}) != "" || d.Holds() {
			t.Errorf("it arrives %v, in the end: %s, %q", arrives, v.state, v.why)
		}
	}
}

// Where an earlier worker couldn't load the module, that is tried again only for a cont that would be refused.
func TestAfterAnAttemptThatFailed(t *testing.T) {
	for _, gate := range []bool{false, true} {
		d := domainOf(t, memory{Clock: byDefault, Gate: gate, Why: "none"}, zerolog.Nop(), func(memory) {})
		_, page := newPage(t, clockpage.Minor)
		attempts := make(chan heard, 1)
		d.load = func(answer heard) {
			select {
			case attempts <- answer:
				answer(nil, "", errors.New("still none"))
			default:
				answer(page, "ptrace", nil)
			}
		}
		d.resume(nil, true)
		settle(d)
		if v := d.view(); v.state != control.Uncorrected || d.Holds() != gate || (len(attempts) > 0) != gate {
			t.Errorf("gate %v: %s, held %v, %d attempts", gate, v.state, d.Holds(), len(attempts))
		}
		first, second := d.Cont(relay.Message{Execute: "cont"}), d.Cont(relay.Message{Execute: "cont"})
		if v := d.view(); strings.HasSuffix(first, "requires it: still none") != gate || second != "" || (v.state == control.Correcting) != gate {
			t.Errorf("gate %v: refusals %q and %q, then %s, %q", gate, first, second, v.state, v.why)
		}
	}
}

// impatient has a cont wait no longer than so for the module.
func impatient(t *testing.T, wait time.Duration) {
	patience := contWait
	contWait = wait
	t.Cleanup(func() { contWait = patience })
}

// settle waits until no attempt runs any more.
func settle(d *domain) {
	if state, _, run := d.module.now(); state.runs() {
		<-run
	}
}

// The log has a line an event, never one a pause.
func TestALineAnEvent(t *testing.T) {
	var log strings.Builder
	n := notebook{log: zerolog.New(&log), save: func(memory) {}}
	for range 1000 {
		n.disagree("so and so")
		n.warn("this")
		n.warn("that")
	}
	p := n.read().Problems
	if lines := strings.Count(log.String(), "\n"); lines != 4+2 || len(p.Warnings) != 2 || p.Disagreements != 1000 {
		t.Errorf("%d lines, %+v:\n%s", lines, p, log.String())
	}
}

// Whoever waits for a stop's answer doesn't wait for a look at the metadata; one that nobody sent through the relay has no answer.
func TestLooksBehindTheAnswer(t *testing.T) {
	looks := 0
	d := testDomain(t, byDefault)
	d.look = func() { looks++ }
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
			d := domainOf(t, memory{Clock: byDefault, Gate: gate}, zerolog.Nop(), func(memory) {})
			loaded, ended := make(chan struct{}), make(chan struct{})
			d.load = func(answer heard) {
				if !fails {
					_, page := newPage(t, clockpage.Minor)
					answer(page, "ptrace", nil)
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
			settle(d)
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
			d := domainOf(t, memory{Clock: byDefault}, zerolog.Nop(), func(m memory) { saved = m })
			f, page := newPage(t, clockpage.Minor)
			if ran {
				write(t, f, atCounts, 1)
			}
			d.load = func(answer heard) { answer(page, "ptrace", nil) }
			entered, leave := make(chan struct{}, 2), make(chan struct{})
			d.importState = func() {
				entered <- struct{}{}
				<-leave
			}
			if taken {
				d.resume(page, true)
			} else {
				d.FromQEMU(relay.Message{Greeting: true})
				settle(d)
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
		d := domainOf(t, memory{Clock: byDefault, Gate: true}, zerolog.Nop(), func(m memory) { saved = m })
		d.load = func(answer heard) { answer(nil, "", errors.New("no module")) }
		d.FromQEMU(relay.Message{Greeting: true})
		settle(d)
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
	impatient(t, 20*time.Millisecond)
	for clock, waits := range map[string]bool{
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`:               true,
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="no"/>`: false,
	} {
		d := domainOf(t, memory{Clock: clock, Gate: true}, zerolog.Nop(), func(memory) {})
		idle := make(chan struct{})
		_, page := newPage(t, clockpage.Minor)
		d.load = func(answer heard) {
			d.module.isBusy(errors.New("main thread is never idle"))
			<-idle
			answer(page, "ptrace", nil)
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
		settle(d)
		if waits {
			if refusal := <-said; refusal != "" {
				t.Errorf("%s: %s", clock, refusal)
			}
		}
		if v := d.view(); v.state != control.Correcting || v.why != "" {
			t.Errorf("%s: it is %s, %q", clock, v.state, v.why)
		}
	}
}

// A loader that never ends holds a cont for so long and no longer, whatever the policy requires.
func TestAContWaitsBounded(t *testing.T) {
	impatient(t, 20*time.Millisecond)
	for clock, refused := range map[string]bool{
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`:               true,
		`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="no"/>`: false,
	} {
		d := domainOf(t, memory{Clock: clock, Gate: true}, zerolog.Nop(), func(memory) {})
		hung := make(chan struct{})
		d.load = func(heard) { <-hung }
		said := make(chan string, 1)
		go func() { said <- d.Cont(relay.Message{Execute: "cont", ID: "1"}) }()
		select {
		case refusal := <-said:
			if (refusal != "") != refused || len(warnings(d)) != 1 {
				t.Errorf("%s: refusal %q, warnings %q", clock, refusal, warnings(d))
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
	d := domainOf(t, memory{Clock: byDefault}, zerolog.New(&logged), func(memory) {})
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
	if said := warnings(d); len(said) != 1 || !strings.Contains(said[0], "libvirt doesn't read") || d.recorder.alone.Load() {
		t.Errorf("warnings %q, alone %t", said, d.recorder.alone.Load())
	}
}
