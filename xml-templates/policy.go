package metadata

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	// Namespace is what makes an element ours; its last part is the version of the language.
	Namespace = "urn:ftclock:domain:1"
	// Prefix is what we write for Namespace. Any other prefix is read as well.
	Prefix = "ftclock"
)

// MinLimit and MaxLimit bound every limit. Guests older than Linux 6.10 wrap the arithmetic of their
// clock at a jump of 36 minutes, so that nothing longer than MaxLimit is ever caught up.
const (
	MinLimit = time.Millisecond
	MaxLimit = 15 * time.Minute
)

// MinSlew and MaxSlew bound how fast a guest is steered, in ppm of the time that it ran. More than MaxSlew isn't told from a
// step; ntpd's and adjtime's own bound is 500, chrony's 83333.
const (
	MinSlew     = 1
	DefaultSlew = 500
	MaxSlew     = 100_000
)

// Action is what happens to the guest's clock at the end of a pause.
type Action uint8

const (
	// CatchUp gives the guest the time that passed.
	CatchUp Action = iota
	// Hold leaves the guest's clock where the pause found it, as QEMU does.
	Hold
)

var actions = []string{"catch-up", "hold"}

func (a Action) String() string { return word(actions, a, "action") }

// Reference is the host clock that a guest is steered to.
type Reference uint8

const (
	// Raw is CLOCK_MONOTONIC_RAW: the guest's clock as if it had never been paused.
	Raw Reference = iota
	// UTC is the host's disciplined CLOCK_REALTIME.
	UTC
)

var references = []string{"raw", "utc"}

func (r Reference) String() string { return word(references, r, "reference") }

// Monitor is where libvirt's connection to the monitor leads.
type Monitor uint8

const (
	// Relayed is to the shim, which passes everything on to QEMU.
	Relayed Monitor = iota
	// Direct is to QEMU. The module is loaded just behind the start.
	Direct
)

var monitors = []string{"relayed", "direct"}

func (m Monitor) String() string { return word(monitors, m, "monitor") }

// word is how a value is written, one of these words.
func word[T ~uint8](words []string, v T, kind string) string {
	if int(v) < len(words) {
		return words[v]
	}
	return fmt.Sprintf("%s %d", kind, uint8(v))
}

// Rule says what happens at one kind of pause.
type Rule struct {
	Do Action
	// Limit is the longest pause that is caught up, MinLimit to MaxLimit; a longer one is held. 0 is
	// no limit of the rule's own: MaxLimit still holds. The checkpoint's limit is also the border
	// above which a pause is a suspend, and is never 0.
	Limit time.Duration
}

// Policy is the content of a clock element.
type Policy struct {
	Reference Reference
	// Slew bounds how fast UTC steers the guest, in ppm of the time that it ran since the last pause: MinSlew to
	// MaxSlew, or 0 for DefaultSlew. Raw steers nothing.
	Slew uint32
	// Monitor counts at the domain's start alone.
	Monitor Monitor
	// Required: the domain doesn't start when its clock can't be corrected.
	Required                              bool
	Checkpoint, Suspend, Restore, Migrate Rule
}

// Default is the policy of an element without attributes and children.
func Default() Policy {
	return Policy{
		Reference:  Raw,
		Monitor:    Relayed,
		Required:   true,
		Checkpoint: Rule{CatchUp, 10 * time.Second},
		Suspend:    Rule{Hold, 0},
		Restore:    Rule{Hold, 0},
		Migrate:    Rule{CatchUp, 60 * time.Second},
	}
}

// eventNames is the order in which events are written and listed.
var eventNames = [...]string{"checkpoint", "suspend", "restore", "migrate"}

// rule returns the rule of an event, or nil when there is no such event.
func (p *Policy) rule(event string) *Rule {
	switch event {
	case "checkpoint":
		return &p.Checkpoint
	case "suspend":
		return &p.Suspend
	case "restore":
		return &p.Restore
	case "migrate":
		return &p.Migrate
	}
	return nil
}

// impliedLimit is the limit of a rule whose element names none.
func impliedLimit(event string, do Action) time.Duration {
	d := Default()
	switch {
	case event == "checkpoint":
		return d.Checkpoint.Limit
	case event == "migrate" && do == CatchUp:
		return d.Migrate.Limit
	}
	return 0
}

// XML returns the clock element. Only what differs from Default is spelled out. ParseElement returns
// the same policy, or refuses one that breaks the rules above (a checkpoint without a limit).
func (p Policy) XML() string { return p.element("\n", "  ") }

// element writes the clock element as libvirt would. lead starts each further line (a newline and
// the indentation of the element, or nothing at all to stay on one line), unit is one indentation.
func (p Policy) element(lead, unit string) string {
	if lead == "" {
		unit = ""
	}
	def := Default()
	var b strings.Builder
	b.WriteString("<" + Prefix + `:clock xmlns:` + Prefix + `="` + Namespace + `"`)
	if p.Reference != def.Reference {
		b.WriteString(` reference="` + p.Reference.String() + `"`)
	}
	if p.Slew != 0 && p.Slew != DefaultSlew {
		b.WriteString(` slew="` + strconv.FormatUint(uint64(p.Slew), 10) + `ppm"`)
	}
	if p.Monitor != def.Monitor {
		b.WriteString(` monitor="` + p.Monitor.String() + `"`)
	}
	if !p.Required {
		b.WriteString(` required="no"`)
	}
	empty := true
	for _, event := range eventNames {
		r, d := p.rule(event), def.rule(event)
		if *r == *d {
			continue
		}
		if empty {
			b.WriteString(">")
			empty = false
		}
		b.WriteString(lead + unit + "<" + Prefix + `:on event="` + event + `"`)
		if r.Do != d.Do {
			b.WriteString(` do="` + r.Do.String() + `"`)
		}
		if r.Limit != impliedLimit(event, r.Do) {
			b.WriteString(` limit="` + formatLimit(r.Limit) + `"`)
		}
		b.WriteString("/>")
	}
	if empty {
		b.WriteString("/>")
	} else {
		b.WriteString(lead + "</" + Prefix + ":clock>")
	}
	return b.String()
}

// maxDecimals makes every limit a whole number of nanoseconds.
const maxDecimals = 6

func formatLimit(d time.Duration) string {
	switch {
	case d > time.Minute && d%time.Minute == 0:
		return strconv.FormatInt(int64(d/time.Minute), 10) + "m"
	case d >= time.Second && d%time.Microsecond == 0:
		return formatDecimal(int64(d/time.Microsecond)) + "s"
	case d < 0:
		return d.String() // only to be refused by the parser
	}
	return formatDecimal(int64(d)) + "ms"
}

// formatDecimal writes millionths.
func formatDecimal(millionths int64) string {
	s := strconv.FormatInt(millionths/1e6, 10)
	if rest := millionths % 1e6; rest != 0 {
		s += "." + strings.TrimRight(fmt.Sprintf("%06d", rest), "0")
	}
	return s
}

const limitAllowed = `1ms to 15m, a number and its unit (ms, s, m or min), such as "250ms" or "1.5s"`

// parseLimit returns the limit, or why it is none.
func parseLimit(s string) (d time.Duration, reason string) {
	number := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	var unit time.Duration
	switch u := s[len(number):]; {
	case strings.HasPrefix(s, "-"):
		return 0, quote(s) + " is negative"
	case u == "ms":
		unit = time.Millisecond
	case u == "s":
		unit = time.Second
	case u == "m", u == "min":
		unit = time.Minute
	case number == "":
		return 0, quote(s) + " has no number"
	case u == "":
		return 0, quote(s) + " has no unit"
	default:
		return 0, quote(s) + " has an unknown unit " + quote(u)
	}
	whole, decimals, point := strings.Cut(number, ".")
	if !digits(whole) || point && !digits(decimals) || len(whole) > 1 && whole[0] == '0' {
		return 0, quote(s) + " isn't a plain number and a unit"
	}
	if len(decimals) > maxDecimals {
		return 0, fmt.Sprintf("%s has more than %d decimals", quote(s), maxDecimals)
	}
	if len(whole) > len("900000") { // MaxLimit in the smallest unit: nothing overflows below
		return 0, quote(s) + " is too long"
	}
	w, _ := strconv.ParseInt(whole, 10, 64)
	f, _ := strconv.ParseInt((decimals + "000000")[:maxDecimals], 10, 64)
	d = time.Duration(w)*unit + time.Duration(f)*(unit/1e6)
	switch {
	case d > MaxLimit:
		return 0, quote(s) + " is too long"
	case d < MinLimit:
		return 0, quote(s) + " is too short"
	}
	return d, ""
}

const slewAllowed = `1ppm to 100000ppm, a whole number and its unit, such as "500ppm"`

// parseSlew returns the slew bound, or why it is none.
func parseSlew(s string) (ppm uint32, reason string) {
	number, unit := strings.CutSuffix(s, "ppm")
	switch {
	case strings.HasPrefix(s, "-"):
		return 0, quote(s) + " is negative"
	case !unit:
		return 0, quote(s) + " has no unit"
	case !digits(number) || len(number) > 1 && number[0] == '0':
		return 0, quote(s) + " isn't a plain number and a unit"
	}
	v, err := strconv.ParseUint(number, 10, 32)
	switch {
	case err != nil || v > MaxSlew:
		return 0, quote(s) + " is too fast"
	case v < MinSlew:
		return 0, quote(s) + " is too slow"
	}
	return uint32(v), ""
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
