package shim

import (
	"slices"
	"sync"

	"github.com/rs/zerolog"
)

// maxWarnings bounds what is kept for status.
const maxWarnings = 16

// A notebook holds what the next worker has to know, and saves it whenever it changes. Status and log have their warnings from it.
type notebook struct {
	log  zerolog.Logger
	save func(memory)

	mu sync.Mutex
	m  memory
}

// read gives what it says now.
func (n *notebook) read() memory {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.m
}

// change has f change it.
func (n *notebook) change(f func(*memory)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.m)
	n.save(n.m)
}

// disagree counts a pause that the two sides measured differently.
func (n *notebook) disagree(what string) {
	var times uint64
	n.change(func(m *memory) {
		m.Problems.Disagreements++
		m.Problems.LastDisagreement = what
		times = m.Problems.Disagreements
	})
	if worthALine(times) {
		n.log.Error().Uint64("disagreements", times).Msg("the two measurements disagree: " + what +
			"; don't trust this clock, and run `ftclock doctor`")
	}
}

// worthALine picks the first of many events, the tenth, the hundredth and so on: the log has a line an event, never one a
// pause.
func worthALine(n uint64) bool {
	for n >= 10 && n%10 == 0 {
		n /= 10
	}
	return n == 1
}

// warn tells of each thing once. What a warning says must not change with each pause.
func (n *notebook) warn(what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := &n.m.Problems
	if slices.Contains(p.Warnings, what) {
		return
	}
	if len(p.Warnings) == maxWarnings {
		p.Warnings = p.Warnings[1:]
	}
	p.Warnings = append(p.Warnings, what)
	n.save(n.m)
	n.log.Warn().Msg(what)
}
