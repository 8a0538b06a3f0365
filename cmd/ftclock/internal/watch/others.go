package watch

import (
	"errors"
	"fmt"
	"maps"
	"time"

	tea "charm.land/bubbletea/v2"

	"ftclock/cmd/ftclock/internal/fleet"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
)

const (
	watchOther       = 2 * time.Second  // from another host's answer to the next question
	watchUnreachable = 10 * time.Second // the same, where there was none
	watchOtherSilent = 10 * time.Second // after which what such a host said last isn't shown any more
	// otherRecords are those of 2 s at 30 pauses a second. More would be known, and more would have to be sent.
	otherRecords = 64
)

// watchedHost is one of the hosts on the screen.
type watchedHost struct {
	fleet.Host
	place  int  // on the command line
	heard  bool // it has answered, or can't
	asking bool
	since  time.Time // of the question that is open
	next   time.Time // when it is asked again
}

// hostAnswered is what another host said.
type hostAnswered struct {
	host   *watchedHost
	answer fleet.Answer
	err    error
	at     time.Time
}

func (m *watchModel) setHosts(hosts []fleet.Host) {
	for i, h := range hosts {
		w := &watchedHost{Host: h, place: i}
		if h.Remote() {
			m.others = append(m.others, w)
		} else {
			m.here = w
		}
	}
}

// many tells whether the domains' hosts are shown.
func (m *watchModel) many() bool { return len(m.others) > 0 }

// waiting is how many other hosts were never heard of.
func (m *watchModel) waiting() (n int) {
	for _, h := range m.others {
		if !h.heard {
			n++
		}
	}
	return n
}

// askOthers asks the other hosts whose time has come.
func (m *watchModel) askOthers() tea.Cmd {
	var all []tea.Cmd
	for _, h := range m.others {
		if h.asking || m.now.Before(h.next) {
			continue
		}
		h.asking, h.since = true, m.now
		all = append(all, func() tea.Msg {
			answer, err := h.Ask(m.ctx, otherRecords)
			return hostAnswered{h, answer, err, time.Now()}
		})
	}
	return tea.Batch(all...)
}

// hostAnswered takes what another host says of its domains. One that can't be asked is a line of its own, in the place of what it
// said before.
func (m *watchModel) hostAnswered(a hostAnswered) {
	h := a.host
	h.asking, h.heard, h.next = false, true, a.at.Add(watchOther)
	entries := map[string]status.Entry{}
	if a.err != nil {
		h.next = a.at.Add(watchUnreachable)
		entries[h.Name+"\x00"] = status.Entry{Mute: true, On: h.Name, Status: control.Status{State: status.Unreachable, Why: whyNot(a.err)}}
	}
	for _, e := range a.answer.Entries {
		entries[h.Name+"\x00"+e.UUID] = e
	}
	maps.DeleteFunc(m.domains, func(key string, d *watched) bool {
		_, there := entries[key]
		return d.host == h && !there
	})
	for key, e := range entries {
		d := m.domains[key]
		if d == nil {
			d = &watched{host: h}
			d.forget()
			m.domains[key] = d
		}
		d.answered(shimAnswered{entry: e, at: a.at})
	}
}

// whyNot is an error of fleet's without the host, which stands before it, and with what can be tried.
func whyNot(err error) string {
	text := ui.ErrorText(err)
	if inner := errors.Unwrap(err); inner != nil {
		text = ui.ErrorText(inner)
	}
	if hint := ui.HintOf(err); hint != "" {
		text += "; " + hint
	}
	return text
}

// silent is the entry of a domain whose host hasn't answered for long, or nil.
func (d *watched) silent(now time.Time) *status.Entry {
	h := d.host
	if h == nil || !h.asking || now.Sub(h.since) <= watchOtherSilent || d.entry.State == status.Unreachable {
		return nil
	}
	return &status.Entry{Mute: true, On: h.Name, Status: control.Status{Name: d.entry.Name, UUID: d.entry.UUID, State: status.Unknown,
		Why: fmt.Sprintf("its host hasn't answered for %d s", int(now.Sub(h.since).Seconds()))}}
}
