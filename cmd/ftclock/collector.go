package main

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ftclock/clockpage"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
	"ftclock/host"
)

// What a scrape waits for one shim, and for all of them: Prometheus gives up a scrape after ten seconds.
const (
	shimWait = 5 * time.Second
	allWait  = 8 * time.Second
)

// maxAsked bounds how many shims are asked at the same time.
const maxAsked = 16

// collector asks the shims whenever Prometheus asks it.
type collector struct{ dirs status.Dirs }

// metric is one kind of metric that each domain has.
type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(s *control.Status) float64
	known func(s *control.Status) bool // nil: always
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("ftclock_"+name, help, append([]string{"domain", "uuid"}, labels...), nil)
}

func hostDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("ftclock_"+name, help, nil, nil)
}

func counter(name, help string, value func(s *control.Status) uint64) metric {
	return metric{desc(name, help), prometheus.CounterValue, func(s *control.Status) float64 { return float64(value(s)) }, nil}
}

func gauge(name, help string, known func(*control.Status) bool, value func(*control.Status) float64) metric {
	return metric{desc(name, help), prometheus.GaugeValue, value, known}
}

// seconds converts a time or a clock from ns.
func seconds[T int64 | uint64](ns T) float64 { return float64(ns) * 1e-9 }

func last(s *control.Status) clockpage.Record { return s.Records[len(s.Records)-1] }

// What some metrics need.
func hasPause(s *control.Status) bool  { return len(s.Records) > 0 }
func hasAnchor(s *control.Status) bool { return s.Anchor.Valid == 1 }
func hasRecord(s *control.Status) bool { return s.Kept != nil }
func hasBegun(s *control.Status) bool  { return !s.Since.IsZero() }
func isPublished(s *control.Status) bool {
	return (s.Mode == control.Relay || status.Direct(s)) && !(s.Since.IsZero() && s.Published.IsZero())
}

// metrics are those of a domain whose shim answers. Counters begin anew with each QEMU.
var metrics = []metric{
	{desc("caught_up_seconds_total", "Time of pauses that the guest's clock was given back."), prometheus.CounterValue,
		func(s *control.Status) float64 { return seconds(s.CaughtUp) }, nil},
	{desc("held_seconds_total", "Time of pauses that the guest's clock wasn't given back, as the policy or a limit says."), prometheus.CounterValue,
		func(s *control.Status) float64 { return seconds(s.HeldTime) }, nil},
	{desc("passed_seconds_total", "Time of pauses for which QEMU's own value went through, as in doubt."), prometheus.CounterValue,
		func(s *control.Status) float64 { return seconds(s.PassedTime) }, nil},
	counter("over_limit_pauses_total", "Pauses that were held because they were longer than the limit of their event.",
		func(s *control.Status) uint64 { return s.OverLimit }),
	counter("reanchored_total", "Anchors that were given up because the running clock had been set by somebody else.",
		func(s *control.Status) uint64 { return s.Reanchored }),
	counter("orders_total", "Pauses for which the shim's order was followed.", func(s *control.Status) uint64 { return s.Orders }),
	counter("stale_orders_total", "Orders of the shim that came for another pause.", func(s *control.Status) uint64 { return s.StaleOrders }),
	counter("concurrent_calls_total", "Calls to the kernel's clock that met another one and were passed through.",
		func(s *control.Status) uint64 { return s.Busy }),
	counter("disagreements_total", "Pauses that the module measured outside the bounds that the monitor showed.",
		func(s *control.Status) uint64 { return s.Disagreements }),
	counter("shim_workers_total", "Workers of the shim that there were; each but the first took over from one that died.",
		func(s *control.Status) uint64 { return s.Workers }),
	gauge("last_residual_seconds", "The kernel's clock less the anchor at the last stop: how far the guest's clock was off.", hasPause,
		func(s *control.Status) float64 { return seconds(last(s).ResidualStop) }),
	gauge("last_pause_timestamp_seconds", "When the last pause ended.", hasPause,
		func(s *control.Status) float64 { return seconds(last(s).ContReal) }),
	gauge("worst_residual_seconds", "The largest residual since the module was loaded, without its sign.", nil,
		func(s *control.Status) float64 { return seconds(s.WorstResidual) }),
	gauge("worst_cost_seconds", "The longest time that the module took at a cont.", nil,
		func(s *control.Status) float64 { return seconds(s.WorstCost) }),
	gauge("anchor_error_seconds", "Bound of the anchor's own error.", hasAnchor,
		func(s *control.Status) float64 { return seconds(s.Anchor.Error) }),
	gauge("anchor_published_timestamp_seconds", "When the anchor in the domain's metadata was last as new as it can be, or the service began.", isPublished,
		func(s *control.Status) float64 {
			return seconds(slices.MaxFunc([]time.Time{s.Since, s.Published}, time.Time.Compare).UnixNano())
		}),
	gauge("served_since_timestamp_seconds", "Since when the shim serves the domain.", hasBegun,
		func(s *control.Status) float64 { return seconds(s.Since.UnixNano()) }),
	{desc("recorded_pauses_total", "Pauses that the record on disk tells of."), prometheus.CounterValue,
		func(s *control.Status) float64 { return float64(s.Kept.Pauses) }, hasRecord},
	{desc("missed_pauses_total", "Pauses that the record knows by their number alone."), prometheus.CounterValue,
		func(s *control.Status) float64 { return float64(s.Kept.Missed) }, hasRecord},
	gauge("record_writable", "1: the record is being written; 0: the disk doesn't take it.", hasRecord,
		func(s *control.Status) float64 { return truth(s.Kept.Problem == "") }),
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var (
	descState = desc("domain_state", "1 for the state that the domain's clock is in, 0 for the others.", "state")
	descBad   = desc("domain_uncorrected", "1: the clock isn't corrected now, whatever the reason, the shim is gone, or shim and module disagreed.")
	descInfo  = desc("domain_info", "What serves the domain; always 1.", "mode", "method", "version")
	descClock = desc("guest_clock", "1 for which of the clocks that ftclock keeps the guest has switched on, 0 for the others.", "clock")
	descCount = desc("pauses_total", "Pauses of the guest, by what was done with QEMU's write of its clock.", "decision")

	descBuild   = prometheus.NewDesc("ftclock_build_info", "The exporter's version; always 1.", []string{"version"}, nil)
	descShims   = hostDesc("shims", "Directories of shims on this host.")
	descListed  = hostDesc("shims_readable", "1: all of them could be read.")
	descRecords = hostDesc("records_readable", "1: the disk of the records answers, or nobody had to ask it.")
	descSync    = hostDesc("host_clock_synchronised", "1: the kernel says that CLOCK_REALTIME is synchronised.")
	descOffset  = hostDesc("host_clock_offset_seconds", "What is still to be corrected in the host's clock.")
	descEst     = hostDesc("host_clock_estimated_error_seconds", "The kernel's estimate of the host clock's error.")
	descMax     = hostDesc("host_clock_maximum_error_seconds", "The kernel's bound of the host clock's error.")
	statesShown = []control.State{control.Starting, control.Correcting, control.Unkept, control.Watching, control.Uncorrected, status.Forgotten, status.Gone, status.Unknown}
)

// Describe sends all descriptions, as prometheus.Collector wants it.
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	for _, m := range metrics {
		to <- m.desc
	}
	for _, d := range []*prometheus.Desc{descState, descBad, descInfo, descClock, descCount, descBuild, descShims, descListed, descRecords, descSync, descOffset, descEst, descMax} {
		to <- d
	}
}

// Collect asks all shims for their metrics.
func (c *collector) Collect(to chan<- prometheus.Metric) {
	to <- prometheus.MustNewConstMetric(descBuild, prometheus.GaugeValue, 1, programVersion())
	host := func(d *prometheus.Desc, v float64) { to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	if h, err := control.ReadHostClock(); err == nil {
		host(descSync, truth(h.Synchronised))
		host(descOffset, seconds(h.Offset))
		host(descEst, seconds(h.EstimatedError))
		host(descMax, seconds(h.MaximumError))
	}
	infos, err := control.List(c.dirs.Shims)
	host(descShims, float64(len(infos)))
	host(descListed, truth(err == nil))
	until := time.Now().Add(allWait)
	var group errgroup.Group
	group.SetLimit(maxAsked)
	for _, info := range infos {
		group.Go(func() error {
			e := c.askInTime(info, until)
			if e.State == status.Off { // its QEMU has ended
				return nil
			}
			for _, m := range ofDomain(e) {
				to <- m
			}
			return nil
		})
	}
	_ = group.Wait()
	lost, err := c.dirs.Forgotten()
	host(descRecords, truth(err == nil))
	for _, e := range lost {
		if slices.ContainsFunc(infos, func(i control.Info) bool { return i.UUID == e.UUID }) {
			continue // its shim ended meanwhile
		}
		for _, m := range ofDomain(e) {
			to <- m
		}
	}
}

// askInTime is Dirs.Entry with a time limit, which is shimWait, or until if that is sooner. A shim that doesn't answer in time, or that this user may not ask, is an entry, too.
func (c *collector) askInTime(info control.Info, until time.Time) status.Entry {
	answers := make(chan status.Entry, 1)
	mute := status.Entry{Mute: true, Status: control.Status{Name: info.Name, UUID: info.UUID, State: status.Unknown}}
	wait := min(shimWait, time.Until(until))
	if wait <= 0 {
		return mute
	}
	go func() {
		e, err := c.dirs.Entry(info, nil, 1)
		if err != nil {
			e = mute
		}
		answers <- e
	}()
	select {
	case e := <-answers:
		return e
	case <-time.After(wait):
		return mute
	}
}

// ofDomain are the metrics of one domain. Labels are made printable: their text may come from a QEMU that an attacker controls.
func ofDomain(e status.Entry) (all []prometheus.Metric) {
	name, uuid := host.OneLine(e.Name), host.OneLine(e.UUID)
	add := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		all = append(all, prometheus.MustNewConstMetric(d, kind, v, append([]string{name, uuid}, labels...)...))
	}
	for _, state := range statesShown {
		add(descState, prometheus.GaugeValue, truth(e.State == state), string(state))
	}
	add(descBad, prometheus.GaugeValue, truth(e.Bad()))
	if e.Mute {
		return all
	}
	add(descInfo, prometheus.GaugeValue, 1, host.OneLine(string(e.Mode)), host.OneLine(e.Method), host.OneLine(e.Version))
	for _, clock := range status.GuestClocks {
		add(descClock, prometheus.GaugeValue, truth(e.GuestClock == clock.Is), string(clock.Is))
	}
	for _, c := range status.Decisions(&e.Status) {
		add(descCount, prometheus.CounterValue, float64(c.N), c.Name)
	}
	for _, m := range metrics {
		if m.known == nil || m.known(&e.Status) {
			add(m.desc, m.kind, m.value(&e.Status))
		}
	}
	return all
}
