package shim

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// busyWait bounds how long loading is tried while QEMU's main thread is busy, and how long a cont waits for that where the domain
// may not run without the module. Hundreds of GiB of memory that are pinned for a device take minutes. Tests are less patient.
var busyWait = 15 * time.Minute

// contWait bounds how long a cont is held until the module is loaded. Tests are less patient.
var contWait = 15 * time.Second

// A moduleState is how far the module is on its way into QEMU.
type moduleState uint8

const (
	absent    moduleState = iota // no attempt to load it has ended: the next cont begins one
	loading                      // the first attempt runs
	failed                       // the last attempt ended without it
	refused                      // and a cont was refused for that: the next one begins another
	retrying                     // an attempt runs after one that failed
	preparing                    // it is loaded, and is given what a loaded guest is caught up from
	loaded                       // it serves
)

// settled says that no cont has to wait.
func (s moduleState) settled() bool { return s == failed || s == loaded }

// runs says that something is under way.
func (s moduleState) runs() bool { return s == loading || s == retrying || s == preparing }

// A moduleEvent is what changes that.
type moduleEvent uint8

const (
	attemptBegins moduleEvent = iota
	attemptFails
	oldAttemptFails // one that nobody waits for any more
	moduleArrives
	importBegins // of what a loaded guest is caught up from, once more
	allDone      // with what ran
	contRefused
)

// transitions are the states that follow upon an event, one for each state that it may come in.
var transitions = [...][7]moduleState{
	// in            absent   loading    failed    refused   retrying   preparing  loaded
	attemptBegins:   {loading, loading, retrying, retrying, retrying, preparing, loaded},
	attemptFails:    {absent, failed, failed, refused, failed, preparing, loaded},
	oldAttemptFails: {refused, retrying, failed, refused, retrying, preparing, loaded},
	moduleArrives:   {loaded, preparing, loaded, loaded, preparing, preparing, loaded},
	importBegins:    {absent, loading, failed, refused, retrying, preparing, preparing},
	allDone:         {absent, failed, failed, refused, failed, loaded, loaded},
	contRefused:     {absent, absent, refused, refused, refused, preparing, loaded},
}

// after is the state that follows upon an event.
func (s moduleState) after(e moduleEvent) moduleState { return transitions[e][s] }

// A module is the module as a cont finds it: whether it has to be waited for, and whether the cont may be refused without it.
type module struct {
	notes *notebook
	// attempt makes an attempt to load it, and tells arrived or failed of that. Set once, before the relay runs.
	attempt func(run chan struct{})

	mu    sync.Mutex
	state moduleState
	run   chan struct{} // what runs, or ran last; closed when that has ended
	busy  bool          // the attempt goes on because QEMU's main thread is busy
	why   string        // it isn't there
	gate  bool          // no cont has gone through yet; only then can one be refused
}

// now gives the state, why the module isn't there, and what runs or ran last.
func (m *module) now() (state moduleState, why string, run chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, m.why, m.run
}

// begin starts an attempt to load it, if none has begun; after one that failed only if again says so.
func (m *module) begin(again bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state.runs() || m.state.settled() && !(again && m.state == failed) {
		return
	}
	m.state = m.state.after(attemptBegins)
	run := make(chan struct{})
	m.run = run
	go func() {
		defer m.end(run)
		m.attempt(run)
	}()
}

// end ends what ran.
func (m *module) end(run chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == run {
		m.state = m.state.after(allDone)
	}
	close(run)
}

// failed ends an attempt without it.
func (m *module) failed(run chan struct{}, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	event := attemptFails
	if m.run != run {
		event = oldAttemptFails
	}
	m.state, m.busy, m.why = m.state.after(event), false, err.Error()
	m.notes.change(func(n *memory) { n.Why = m.why })
}

// arrived says that it is there.
func (m *module) arrived(method string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.busy, m.why = m.state.after(moduleArrives), false, ""
	m.notes.change(func(n *memory) { n.Why, n.Method = "", method })
}

// isBusy says that loading is tried again.
func (m *module) isBusy(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.busy {
		m.notes.log.Info().Err(err).Msg("QEMU is busy: loading the module is tried again until it isn't")
		m.notes.change(func(n *memory) { n.Why = "" }) // the next worker tries, too
	}
	m.busy, m.why = true, err.Error()
}

// importAgain has give, which gives it what a loaded guest is caught up from, called once more, and a cont wait for that. An attempt
// that has still to end does so anyway.
func (m *module) importAgain(give func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != preparing && m.state != loaded {
		return
	}
	m.state = m.state.after(importBegins)
	before, run := m.run, make(chan struct{})
	m.run = run
	go func() {
		defer m.end(run)
		if before != nil {
			<-before
		}
		give()
	}()
}

// holds: as long as a cont can be refused, and while it would wait.
func (m *module) holds() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gate || !m.state.settled()
}

// open says that the guest runs, or may run without the module: from now on no cont is refused.
func (m *module) open() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gate {
		m.gate = false
		m.notes.change(func(n *memory) { n.Gate = false })
	}
}

// admit has a cont wait until the module is there, bounded, and says whether it is. A cont that mustn't go on without is refused.
func (m *module) admit() (there bool, refusal string) {
	m.mu.Lock()
	serves := m.state == loaded && !m.gate
	m.mu.Unlock()
	if serves {
		return true, ""
	}
	m.begin(false)
	m.await()
	m.mu.Lock()
	defer m.mu.Unlock()
	there = m.state == preparing || m.state == loaded
	switch {
	case !m.gate:
	case there:
		m.gate = false
		m.notes.change(func(n *memory) { n.Gate = false })
	default: // the next cont finds a new attempt: who fixes the cause only has to resume again
		m.state, m.run = m.state.after(contRefused), nil
		refusal = "ftclock: the guest's clock can't be kept, and the domain's metadata requires it: " + m.why
	}
	return there, refusal
}

// await waits, bounded, while something runs: for as long as QEMU is busy, where a cont without the module would be refused.
func (m *module) await() {
	state, _, run := m.now()
	if !state.runs() {
		return
	}
	for began := time.Now(); ; {
		timer := time.NewTimer(contWait)
		select {
		case <-run:
			timer.Stop()
			return
		case <-timer.C:
		}
		if !m.patient(time.Since(began)) {
			return
		}
	}
}

// patient says whether a cont waits on.
func (m *module) patient(waited time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gate && m.busy && waited < busyWait {
		return true
	}
	m.why = fmt.Sprintf("loading the module took longer than %v", waited.Round(time.Second))
	if !m.busy {
		m.notes.change(func(n *memory) { n.Why = m.why })
	}
	m.notes.warn("a cont goes on without the module: " + m.why + "; `ftclock status` tells when it is there")
	return false
}

// loadNow makes an attempt, whatever became of earlier ones, and waits for its end. The error says why the module isn't there.
func (m *module) loadNow() error {
	m.begin(true)
	state, why, run := m.now()
	if state.runs() {
		<-run
		state, why, _ = m.now()
	}
	if state != loaded {
		return errors.New(why)
	}
	return nil
}
