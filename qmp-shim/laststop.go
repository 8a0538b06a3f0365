package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ftclock/clockpage"
)

// LastStops is where a host keeps what the clocks of domains read when their QEMU ended while they were paused, a file
// a domain's UUID: after virsh save, a managed save, or a snapshot that stops the domain.
const LastStops = "/var/lib/ftclock"

// lastStop is a reading of a guest's clock, ns.
type lastStop struct {
	Saved uint64 `json:"saved_ns"` // kvmclock
	Real  uint64 `json:"real_ns"`  // CLOCK_REALTIME at the same time
}

// bad says why a reading can't be. It comes from QEMU, or from a file.
func (l lastStop) bad(now time.Time) error {
	const century = 100 * 365 * 24 * time.Hour
	switch {
	case l.Saved == 0 || l.Saved > uint64(century):
		return fmt.Errorf("a guest's clock of %d ns can't be", l.Saved)
	case l.Real == 0 || l.Real > uint64(now.UnixNano()):
		return fmt.Errorf("a stop at %d ns isn't in the past", l.Real)
	}
	return nil
}

func (s *shim) lastStopPath() string { return filepath.Join(s.LastStops, s.UUID+".json") }

// keepLastStop notes where the guest's clock stood if QEMU ended while it was paused, for the next QEMU that the state
// is loaded into. After any other end there is nothing to go on from.
func (s *shim) keepLastStop() {
	err := func() error {
		s.domain.mu.Lock()
		page := s.domain.page
		s.domain.mu.Unlock()
		if page == nil {
			return errors.New("there is no page")
		}
		now, err := page.Now()
		if err != nil {
			return err
		}
		if now.Paused != 1 {
			return errors.New("it wasn't paused")
		}
		stop := lastStop{Saved: now.Saved, Real: now.StopReal}
		if err := stop.bad(time.Now()); err != nil {
			return err
		}
		return s.writeLastStop(stop)
	}()
	if err != nil {
		_ = os.Remove(s.lastStopPath())
		s.Log.Debug().Err(err).Msg("nothing to go on from")
	}
}

func (s *shim) writeLastStop(stop lastStop) error {
	text, err := json.Marshal(stop)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.LastStops, 0o700); err != nil {
		return err
	}
	next := s.lastStopPath() + ".new"
	if err := os.WriteFile(next, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.lastStopPath())
}

// importLastStop gives the module what the last QEMU left. It counts only for the very value that was read then.
func (s *shim) importLastStop(page *clockpage.Page) {
	text, err := os.ReadFile(s.lastStopPath())
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var stop lastStop
	if err == nil {
		err = json.Unmarshal(text, &stop)
	}
	if err == nil {
		err = stop.bad(time.Now())
	}
	if err != nil {
		s.Log.Warn().Err(err).Str("file", s.lastStopPath()).Msg("a restored guest can't be caught up")
		return
	}
	page.SetImport(clockpage.Import{Saved: stop.Saved, Real: stop.Real})
}
