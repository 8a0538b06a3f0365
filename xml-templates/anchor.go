package metadata

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	// AnchorNamespace is the namespace of the anchor element, which is ftclock's own note in a running domain's metadata:
	// libvirt carries it to the host that the domain is migrated to, and into the image of a saved one.
	AnchorNamespace = "urn:ftclock:anchor:1"
	// AnchorPrefix is what we write for AnchorNamespace.
	AnchorPrefix = "ftclock-anchor"
)

// Bounds of an anchor: a century, and the fastest that the kernel lets CLOCK_REALTIME run (adjtimex(2): 500 ppm of
// frequency and 10 % of tick).
const (
	maxClock = uint64(100 * 365 * 24 * time.Hour)
	maxRate  = int64(1e6) // ppb; more isn't disciplined any more
	maxKHz   = 100_000_000
)

// Anchor is what a guest's clock read at one instant, for the host or the process that goes on with the guest. Nothing
// else is ever done with it, so that whoever edits it moves that guest's clock and no other, by no more than the policy's
// limit.
type Anchor struct {
	Clock uint64 `json:"clock_ns"` // kvmclock, ns
	Real  uint64 `json:"real_ns"`  // CLOCK_REALTIME of the host, ns
	Raw   uint64 `json:"raw_ns"`   // its CLOCK_MONOTONIC_RAW, ns
	// Boot and Slept say how far Raw is good: on this boot of this host (/proc/sys/kernel/random/boot_id), as long as it
	// hasn't slept for longer than so many ns in all.
	Boot  string `json:"boot_id"`
	Slept uint64 `json:"slept_ns"`
	Rate  int64  `json:"rate_ppb"` // by so much CLOCK_REALTIME runs faster than the guest's clock
	Error uint64 `json:"error_ns"` // bound of Clock's error at that instant
	// HostError bounds the error of Real against UTC, as adjtimex(2) has it (maxerror), ns.
	HostError    uint64 `json:"host_error_ns"`
	Synchronised bool   `json:"synchronised"` // whether the host's clock is
	// TSC is what the guest's TSC read at that instant, and KHz its frequency; both 0 where it isn't known.
	TSC uint64 `json:"tsc,omitempty"`
	KHz uint64 `json:"tsc_khz,omitempty"`
}

// Check says what in an anchor can't be.
func (a Anchor) Check() error {
	switch {
	case a.Clock > maxClock:
		return fmt.Errorf("a guest's clock of %d ns can't be", a.Clock)
	case a.Real == 0 || a.Real > maxClock:
		return fmt.Errorf("a host's time of %d ns can't be", a.Real)
	case a.Raw > maxClock || a.Slept > maxClock || a.Error > maxClock || a.HostError > maxClock:
		return errors.New("times of more than a century can't be")
	case a.Rate > maxRate || a.Rate < -maxRate:
		return fmt.Errorf("a rate of %d ppb can't be", a.Rate)
	case a.KHz > maxKHz:
		return fmt.Errorf("a TSC of %d kHz can't be", a.KHz)
	case len(a.Boot) > 64:
		return errors.New("a boot's id isn't that long")
	}
	return nil
}

// fields are the attributes of the element, in the order in which they are written.
func (a *Anchor) fields() []struct {
	name string
	at   any
} {
	return []struct {
		name string
		at   any
	}{
		{"clock", &a.Clock}, {"real", &a.Real}, {"raw", &a.Raw}, {"boot", &a.Boot}, {"slept", &a.Slept},
		{"rate", &a.Rate}, {"error", &a.Error}, {"host-error", &a.HostError}, {"synchronised", &a.Synchronised},
		{"tsc", &a.TSC}, {"tsc-khz", &a.KHz},
	}
}

// XML returns the anchor element without its namespace, as virDomainSetMetadata takes it.
func (a Anchor) XML() string {
	var b strings.Builder
	b.WriteString("<anchor")
	for _, f := range a.fields() {
		var value string
		switch v := f.at.(type) {
		case *uint64:
			value = strconv.FormatUint(*v, 10)
		case *int64:
			value = strconv.FormatInt(*v, 10)
		case *bool:
			value = map[bool]string{true: "yes", false: "no"}[*v]
		case *string:
			value = escape(*v, '"')
		}
		b.WriteString(" " + f.name + `="` + value + `"`)
	}
	b.WriteString("/>")
	return b.String()
}

// ParseAnchor reads an anchor element that stands alone, as XML gives it.
func ParseAnchor(xml []byte) (Anchor, error) {
	r := &anchorReader{}
	if err := scan(xml, r); err != nil {
		return Anchor{}, err
	}
	return r.anchor, r.err
}

// anchorReader reads a document that is an anchor element.
type anchorReader struct {
	anchor Anchor
	err    error
}

func (r *anchorReader) open(s *scanner, e *element) error {
	if len(s.stack) != 1 || e.local != "anchor" {
		return s.fail(e.start, "", "not an anchor", "one empty element anchor")
	}
	r.anchor, r.err = readAnchor(e)
	return nil
}

func (*anchorReader) text(*scanner, *element, []byte, int) error { return nil }
func (*anchorReader) close(*scanner, *element) error             { return nil }

// readAnchor reads an anchor element. It never keeps a domain from starting: one that can't be read is none, and why
// says so. Attributes that it doesn't know are a later version's.
func readAnchor(e *element) (a Anchor, err error) {
	for _, f := range a.fields() {
		attr := e.attr(f.name)
		switch {
		case attr == nil && (f.at == &a.TSC || f.at == &a.KHz): // an earlier version's
			continue
		case attr == nil:
			return Anchor{}, fmt.Errorf("it has no %s", f.name)
		}
		switch v := f.at.(type) {
		case *uint64:
			*v, err = strconv.ParseUint(attr.value, 10, 64)
		case *int64:
			*v, err = strconv.ParseInt(attr.value, 10, 64)
		case *bool:
			*v = attr.value == "yes"
		case *string:
			*v = attr.value
		}
		if err != nil {
			return Anchor{}, fmt.Errorf("its %s is %s", f.name, quote(attr.value))
		}
	}
	return a, a.Check()
}
