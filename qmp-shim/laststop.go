package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/disk"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// lastStop is a reading of a guest's clock, ns.
type lastStop struct {
	Saved uint64 `json:"saved_ns"` // kvmclock
	Real  uint64 `json:"real_ns"`  // CLOCK_REALTIME at the same time
	Raw   uint64 `json:"raw_ns"`   // and CLOCK_MONOTONIC_RAW, good as metadata.Anchor says
	Boot  string `json:"boot_id"`
	Slept uint64 `json:"slept_ns"`
	TSC   uint64 `json:"tsc,omitempty"`     // the guest's at the same time, and its frequency; 0: not known
	KHz   uint32 `json:"tsc_khz,omitempty"` // kHz
}

// bad says why a reading can't be, at this time. It comes from QEMU, or from a file.
func (l lastStop) bad(at instant) error {
	const century = 100 * 365 * 24 * time.Hour
	switch {
	case l.Saved == 0 || l.Saved > uint64(century):
		return fmt.Errorf("a guest's clock of %d ns can't be", l.Saved)
	case l.Real == 0 || l.Real > at.real && !l.onRaw(at): // by its raw reading it may be in the past, and the host's clock have been set back
		return fmt.Errorf("a stop at %d ns isn't in the past", l.Real)
	}
	return nil
}

// onRaw says whether its raw reading is good on this host now.
func (l lastStop) onRaw(at instant) bool { return here(l.Boot, l.Slept, at) && l.Raw <= at.raw }

func (s *shim) lastStopPath() string { return filepath.Join(s.LastStops, s.UUID+".json") }

// keepLastStop notes where the guest's clock stood if QEMU ended while it was paused, for the next QEMU that the state
// is loaded into. After any other end there is nothing to go on from.
func (s *shim) keepLastStop() {
	if _, _, ok := host.ProcessOf(s.UUID); ok { // not libvirt's: no other has that name
		return
	}
	stop, err := func() (stop lastStop, err error) {
		page := s.domain.view().page
		if page == nil {
			return stop, errors.New("there is no page")
		}
		now, err := page.Now()
		if err != nil {
			return stop, err
		}
		if now.Paused != 1 {
			return stop, errors.New("it wasn't paused")
		}
		at := readInstant()
		// What the guest's clock is off by is left to correct, and isn't to go on from: over many restores it would add up.
		var left uint64
		slept, known := at.slept, false
		if a, err := page.Anchor(); err == nil && a.Valid == 1 {
			slept, known = a.Slept, true
			left = now.Saved - readOn(a, instant{raw: now.StopRaw, slept: a.Slept})
			if most := int64(time.Millisecond); int64(left) > most || int64(left) < -most {
				left = 0
			}
		}
		stop = lastStop{Saved: now.Saved, Real: now.StopReal + left, Raw: now.StopRaw + left, Boot: host.BootID(), Slept: slept,
			TSC: now.TSC, KHz: now.KHz}
		apart := int64(at.real-now.StopReal) - int64(at.raw-now.StopRaw)
		switch set := apart > int64(time.Second) || apart < -int64(time.Second); {
		case set && known && stop.onRaw(at): // somebody set the host's clock since the stop: from now on it is another
			stop.Real += uint64(apart)
		case set && !known: // or the host slept: CLOCK_REALTIME knows better
			stop.Boot = ""
		}
		return stop, stop.bad(at)
	}()
	if err != nil {
		_ = os.Remove(s.lastStopPath())
		s.Log.Debug().Err(err).Msg("nothing to go on from")
	} else if err := s.writeLastStop(stop); err != nil {
		_ = os.Remove(s.lastStopPath())
		s.Log.Warn().Err(err).Msg("a restored guest can't be caught up from this stop; make room, or fix the disk")
	}
}

func (s *shim) writeLastStop(stop lastStop) error {
	text, err := json.Marshal(stop)
	if err != nil {
		return err
	}
	return host.WriteFile(s.lastStopPath(), append(text, '\n'))
}

// readLastStop reads what the last QEMU left; nil if it left nothing that is of use.
func (s *shim) readLastStop() *lastStop {
	read := make(chan []byte, 1)
	err := disk.InTime(context.Background(), s.lastStopPath(), func() error {
		text, err := os.ReadFile(s.lastStopPath())
		read <- text
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var stop lastStop
	if err == nil {
		err = json.Unmarshal(<-read, &stop)
	}
	if err == nil {
		err = stop.bad(readInstant())
	}
	if err != nil {
		s.Log.Warn().Err(err).Str("file", s.lastStopPath()).Msg("a restored guest can't be caught up by this reading; it is replaced at the next save")
		return nil
	}
	return &stop
}

// of says whether a stop is of the guest that an anchor came with: it is on the anchor's line, and no older. An older one is of a
// guest that ran elsewhere since.
func (l lastStop) of(a metadata.Anchor) bool {
	since := int64(l.Real - a.Real)
	if l.Boot != "" && l.Boot == a.Boot && sameSleep(l.Slept, a.Slept) { // on which CLOCK_REALTIME may have been set meanwhile
		since = int64(l.Raw - a.Raw)
	}
	off := int64(l.Saved-a.Clock) - since
	return off < int64(time.Second) && off > -int64(time.Second) && since >= 0
}

// importState gives the module what a state that this QEMU loads is caught up from. The last stop on this host is the best
// there is. It is good for the very value that was read then, or, if the anchor that came with the domain's metadata says
// that it is of the same guest, for any state of it. Without such a stop the anchor itself is.
func (s *shim) importState() {
	var err error
	stop := s.readLastStop()
	incoming := s.Incoming
	if incoming == "" && (s.domain.notes.read().Loads || loadsSnapshot(s.knownQEMU().pid)) {
		incoming = control.Restored // libvirt calls the hook for a start like any other
	}
	switch {
	case incoming == control.Migrated && s.Anchor != nil:
		err = s.domain.importAnchor(*s.Anchor, clockpage.Migrate)
	case incoming == control.Migrated:
		err = errors.New("no anchor came with it: `systemctl enable --now ftclock-anchor.timer` on the host that it came from, or `ftclock anchor publish` there before a migration")
	case stop != nil && (incoming == "" || s.Anchor == nil || stop.of(*s.Anchor)):
		v := clockpage.Import{Clock: stop.Saved, At: stop.Real, Event: clockpage.Restore, TSC: stop.TSC, KHz: stop.KHz}
		if incoming == control.Restored && s.Anchor != nil {
			v.Any = 1 // an older state of the same guest is on the same line
		}
		if stop.onRaw(readInstant()) {
			v.Leg, v.At = clockpage.LegRaw, stop.Raw
		} else {
			v.Error = uint64(readHostClock().MaximumError)
		}
		_, err = s.domain.setImport(v, incoming == control.Restored && v.Any == 0)
	case incoming == control.Restored && s.Anchor != nil:
		err = s.domain.importAnchor(*s.Anchor, clockpage.Restore)
	case incoming == control.Restored:
		err = errors.New("nothing is known of its stop: it was saved on another host, or without ftclock, and no anchor came with it")
	}
	if err != nil {
		s.domain.cantCatchUp(incoming, err)
	}
}

// loadsSnapshot says whether QEMU was started to load an internal snapshot (qemu(1), -loadvm), as libvirt before 10.10 does.
func loadsSnapshot(pid int) bool {
	cmdline, err := host.ReadText(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && slices.Contains(strings.Split(string(cmdline), "\x00"), "-loadvm")
}
