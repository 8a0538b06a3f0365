package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/host"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
)

// checkpoints are so many of each domain; its test makes fewer.
var checkpoints = 200

const (
	pause    = 5 * time.Millisecond
	between  = 10 * time.Millisecond // the guest runs
	every    = 10                    // checkpoints from one reading of the drift to the next
	turns    = 10                    // of either domain, for the costs
	eachTurn = 6                     // checkpoints, and pairs of stop and cont

	glance   = 250 * time.Millisecond // a reading of the drift along the way
	look     = time.Second            // the first and the last, which decide
	patience = 10 * time.Second       // for the events of QEMU that are still on their way
)

// point is the guest's drift after so many checkpoints: what its clock has lost to CLOCK_MONOTONIC_RAW, in ns.
// Negative: the clock is ahead.
type point struct {
	checkpoints int
	drift       int64
}

// course is what is measured of one domain. All times are nanoseconds.
type course struct {
	points    []point // the drift along the way, first and last included
	paused    int64   // in all, from QEMU's STOP events to its RESUME events
	backsteps uint64  // how often the guest saw its clock go back
	overheads []int64 // of checkpoints: the call to suspend and the call to resume
	commands  []int64 // of pairs: QMP stop and QMP cont
	module    []int64 // of each checkpoint: what the module took at its cont; none without ftclock
}

// drift is what the checkpoints left.
func (c *course) drift() int64 { return c.points[len(c.points)-1].drift }

// laboratory is the private libvirt with what a run needs.
type laboratory struct {
	conn *libvirt.Connect
	elf  string // the kvmclock guest
}

func open() (*laboratory, error) {
	elf, err := guest.Copy(privatelibvirt.Dir)
	if err != nil {
		return nil, err
	}
	// Before connecting: a connection takes the implementation that there is.
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return nil, fmt.Errorf("preparing for events: %w", err)
	}
	go func() {
		for libvirt.EventRunDefaultImpl() == nil {
		}
	}()
	conn, err := privatelibvirt.Connect()
	if err != nil {
		return nil, err
	}
	return &laboratory{conn: conn, elf: elf}, nil
}

func (l *laboratory) close() { _, _ = l.conn.Close() }

// subject is a running domain that is measured.
type subject struct {
	*privatelibvirt.Domain
	conn   *libvirt.Connect
	clock  *guest.Clock
	served bool // by ftclock
	course course
}

// start starts a domain with that metadata.
func (l *laboratory) start(name, metadata string) (_ *subject, err error) {
	d, err := privatelibvirt.Define(l.conn, privatelibvirt.Manage(privatelibvirt.GuestXML(name, l.elf), metadata))
	if err != nil {
		return nil, err
	}
	s := &subject{Domain: d, conn: l.conn, served: metadata != ""}
	defer func() {
		if err != nil {
			err = errors.Join(explain(name, err), d.Remove())
		}
	}()
	if err := d.Create(); err != nil {
		return nil, fmt.Errorf("starting: %w", err)
	}
	s.clock, err = d.Clock()
	return s, err
}

func (s *subject) remove() error { return errors.Join(s.clock.Close(), s.Remove()) }

// explain adds the domain's logs, which go with the private libvirt, to an error.
func explain(name string, err error) error {
	shim, _ := os.ReadFile(filepath.Join(host.LogDir, name+".log"))
	return fmt.Errorf("%s: %w\n%s%s", name, err, privatelibvirt.Log(name), shim)
}

// follow makes the checkpoints and follows the guest's clock. It leaves the domain suspended, which costs nobody time.
func (s *subject) follow(p *progress) (err error) {
	defer func() {
		if err != nil {
			err = explain(s.Name, err)
		}
	}()
	earlier, err := s.recorded()
	if err != nil {
		return err
	}
	watch, err := watchPauses(s.conn, s.Domain)
	if err != nil {
		return err
	}
	defer watch.end()

	c := &s.course
	p.begin(s.Name)
	start, _, err := s.clock.Offset(look)
	if err != nil {
		return err
	}
	c.points = []point{{}}
	for n := 1; n <= checkpoints; n++ {
		if _, err := s.checkpoint(); err != nil {
			return err
		}
		time.Sleep(between)
		if n%every == 0 {
			window := glance
			if n == checkpoints {
				window = look
			}
			offset, _, err := s.clock.Offset(window)
			if err != nil {
				return err
			}
			c.points = append(c.points, point{n, offset - start})
		}
		p.step(n, c.drift())
	}
	p.finish()

	if c.backsteps, _, err = s.clock.Backsteps(); err != nil {
		return err
	}
	if c.paused, err = watch.sum(checkpoints); err != nil {
		return err
	}
	records, err := s.recorded()
	if err != nil {
		return err
	}
	for _, r := range records[min(len(earlier), len(records)):] {
		c.module = append(c.module, int64(r.Cost))
	}
	return s.Suspend()
}

// compareCosts measures in turns, since what else a host does changes from second to second.
func compareCosts(subjects ...*subject) error {
	for range turns {
		for _, s := range subjects {
			if err := s.costs(); err != nil {
				return explain(s.Name, err)
			}
		}
	}
	return nil
}

// costs is one turn of a suspended domain.
func (s *subject) costs() error {
	if err := s.Resume(); err != nil {
		return err
	}
	for range eachTurn {
		time.Sleep(between)
		commands, err := s.stopAndCont()
		if err != nil {
			return err
		}
		time.Sleep(between) // libvirt hears of it by events
		overhead, err := s.checkpoint()
		if err != nil {
			return err
		}
		s.course.overheads = append(s.course.overheads, overhead.Nanoseconds())
		s.course.commands = append(s.course.commands, commands.Nanoseconds())
	}
	return s.Suspend()
}

// checkpoint pauses the domain once and returns what that took beyond the pause.
func (s *subject) checkpoint() (time.Duration, error) {
	began := time.Now()
	if err := s.Suspend(); err != nil {
		return 0, fmt.Errorf("suspending: %w", err)
	}
	suspended := time.Now()
	time.Sleep(pause)
	resuming := time.Now()
	if err := s.Resume(); err != nil {
		return 0, fmt.Errorf("resuming: %w", err)
	}
	return suspended.Sub(began) + time.Since(resuming), nil
}

// stopAndCont times bare QMP commands on libvirt's own monitor, the one that ftclock relays.
func (s *subject) stopAndCont() (time.Duration, error) {
	began := time.Now()
	for _, command := range []string{"stop", "cont"} {
		if _, err := s.QemuMonitorCommand(`{"execute":"`+command+`"}`, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT); err != nil {
			return 0, fmt.Errorf("QMP %s: %w", command, err)
		}
	}
	return time.Since(began), nil
}

// recorded is what the module has recorded so far, oldest first. It keeps more than the checkpoints. A domain that
// isn't served has no module.
func (s *subject) recorded() ([]clockpage.Record, error) {
	if !s.served {
		return nil, nil
	}
	status, err := s.Status(256)
	if err != nil {
		return nil, err
	}
	if status.State != control.Correcting {
		return nil, fmt.Errorf("ftclock isn't correcting the clock, it is %s: %s", status.State, status.Why)
	}
	return status.Records, nil
}

// pauseWatch adds up a domain's pauses as QEMU itself tells of them.
type pauseWatch struct {
	conn      *libvirt.Connect
	callbacks []int

	mu      sync.Mutex
	stopped int64 // of the newest STOP event: CLOCK_REALTIME, ns
	paused  int64 // ns
	pauses  int
}

func watchPauses(conn *libvirt.Connect, d *privatelibvirt.Domain) (*pauseWatch, error) {
	w := &pauseWatch{conn: conn}
	for _, name := range []string{"STOP", "RESUME"} {
		id, err := conn.DomainQemuMonitorEventRegister(d.Domain, name, w.see, 0)
		if err != nil {
			w.end()
			return nil, fmt.Errorf("watching for %s events: %w", name, err)
		}
		w.callbacks = append(w.callbacks, id)
	}
	return w, nil
}

func (w *pauseWatch) see(_ *libvirt.Connect, _ *libvirt.Domain, e *libvirt.DomainQemuMonitorEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := e.Seconds*1e9 + int64(e.Micros)*1e3
	if e.Event == "STOP" {
		w.stopped = at
		return
	}
	w.paused += at - w.stopped
	w.pauses++
}

// sum waits until QEMU has told of so many pauses, and returns how long they were in all, in ns.
func (w *pauseWatch) sum(pauses int) (int64, error) {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		w.mu.Lock()
		paused, seen := w.paused, w.pauses
		w.mu.Unlock()
		if seen == pauses {
			return paused, nil
		}
		if seen > pauses || time.Now().After(end) {
			return 0, fmt.Errorf("QEMU told of %d pauses, %d were made", seen, pauses)
		}
	}
}

func (w *pauseWatch) end() {
	for _, id := range w.callbacks {
		_ = w.conn.DomainQemuEventDeregister(id)
	}
}
