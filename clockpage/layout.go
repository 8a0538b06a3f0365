package clockpage

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
)

// Constants of clockpage.h.
const (
	Name       = "ftclock-page"
	Magic      = 0x314b434f4c435446
	Major      = 1
	Minor      = 3
	Size       = 36864
	RingLen    = 256
	RecordSize = 128

	// LimitMax is the longest pause, in ns, that any policy may catch up.
	LimitMax = 900_000_000_000
	// Tolerance is the |residual|, in ns, up to which the kernel's clock counts as right.
	Tolerance = 1000
	// FollowMax is how far, in ns, a guest may be off its reference and still follow it.
	FollowMax = 10_000_000_000
	// SlewMax is the largest Policy.SlewPPM.
	SlewMax = 100_000
)

// Head says what the page is. Written once by the module, Magic last.
type Head struct {
	Magic      uint64
	Major      uint32
	Minor      uint32
	Size       uint32
	RingLen    uint32
	RecordSize uint32
	PID        uint32 // of QEMU, as QEMU sees it
	LoadedRaw  uint64 // ns, CLOCK_MONOTONIC_RAW
	_          [3]uint64
}

// Policy is the standing policy, written by the shim. Limits are ns.
type Policy struct {
	seq             uint32
	Enabled         uint32
	Reference       uint32
	SlewPPM         uint32
	CheckpointDo    Do
	SuspendDo       Do
	RestoreDo       Do
	MigrateDo       Do
	CheckpointLimit uint64
	SuspendLimit    uint64
	RestoreLimit    uint64
	MigrateLimit    uint64
}

// Order says when one pause was, as the shim saw it; it is written before the shim lets the cont go on. Times are ns,
// CLOCK_MONOTONIC_RAW.
type Order struct {
	seq     uint32
	_       uint32
	Pause   uint64 // Now.Pause when the order was written: it is good for no other
	StopRaw uint64
	ContRaw uint64
	Lost    uint64
	_       [3]uint64
}

// Counts are the module's counters since it was loaded. CaughtUp, HeldTime and PassedTime are ns.
type Counts struct {
	Pauses        uint64 `json:"pauses"`
	Dropped       uint64 `json:"dropped"`
	Anchored      uint64 `json:"anchored"`
	Held          uint64 `json:"held"`
	Passed        uint64 `json:"passed"`
	OverLimit     uint64 `json:"over_limit"`
	Reanchored    uint64 `json:"reanchored"`
	StaleOrders   uint64 `json:"stale_orders"`
	Orders        uint64 `json:"orders"`
	Busy          uint64 `json:"busy"`
	CaughtUp      uint64 `json:"caught_up_ns"`
	HeldTime      uint64 `json:"held_ns"`
	WorstResidual uint64 `json:"worst_residual_ns"`
	WorstCost     uint64 `json:"worst_cost_ns"`
	PassedTime    uint64 `json:"passed_ns"`
	_             uint64
}

// Now is the pause that is on, or the next one.
type Now struct {
	seq      uint32
	Paused   uint32
	Pause    uint64
	Saved    uint64 // ns, kvmclock
	StopRaw  uint64 // ns
	StopReal uint64 // ns
	TSC      uint64 // ticks, vCPU 0's at the same time; 0: not known
	KHz      uint32 // its frequency; 0: not known, or it isn't the host's
	_        uint32
	_        uint64
}

// Anchor is a set of clock readings, in ns, of one instant.
type Anchor struct {
	seq   uint32
	Valid Flag32 `json:"valid"`
	Epoch uint64 `json:"epoch"`
	Clock uint64 `json:"clock_ns"` // kvmclock
	Raw   uint64 `json:"raw_ns"`   // CLOCK_MONOTONIC_RAW
	Real  uint64 `json:"real_ns"`  // CLOCK_REALTIME
	Boot  uint64 `json:"boot_ns"`  // CLOCK_BOOTTIME
	Steer int64  `json:"steer_ns"`
	Error uint64 `json:"error_ns"`
	Slept uint64 `json:"slept_ns"` // how long the host had slept since it booted

	TSC uint64 `json:"tsc"`     // ticks, vCPU 0's; 0: not known
	KHz uint32 `json:"tsc_khz"` // its frequency; 0: not known, or it isn't the host's
	_   uint32
	_   [5]uint64
}

// Lost is what stock QEMU would have taken from the guest's clock, ns.
func (c Counts) Lost() uint64 { return c.CaughtUp + c.HeldTime + c.PassedTime }

// Outcome is what was done with a pause, why, and what it was taken for.
type Outcome struct {
	Decision Decision `json:"decision"`
	Reason   Reason   `json:"reason"`
	Event    Event    `json:"event"`
}

// CaughtUp says that the guest was given the pause back.
func (o Outcome) CaughtUp() bool { return o.Decision == Dropped || o.Decision == Anchored }

// InDoubt says that QEMU's own value went through because of a doubt. The first write of all is no pause, and none is meant to be
// caught up where no stop was seen before it.
func (o Outcome) InDoubt() bool { return o.Decision == Passed && o.Reason != First && o.Event != Start }

// Uncorrected says that the pause should have been caught up and wasn't: in doubt, or because it was longer than its limit.
func (o Outcome) Uncorrected() bool {
	return o.InDoubt() || o.Decision == Held && o.Reason == OverLimit
}

// Flag8 and Flag32 are true where they are 1, with the size that the page has for them. In JSON they are true or false.
type (
	Flag8  uint8
	Flag32 uint32
)

// MarshalJSON writes 1 as true.
func (f Flag8) MarshalJSON() ([]byte, error) { return strconv.AppendBool(nil, f == 1), nil }

// MarshalJSON writes 1 as true.
func (f Flag32) MarshalJSON() ([]byte, error) { return strconv.AppendBool(nil, f == 1), nil }

// UnmarshalJSON reads true or false.
func (f *Flag8) UnmarshalJSON(text []byte) error {
	*f = 0
	var set bool
	err := json.Unmarshal(text, &set)
	if set {
		*f = 1
	}
	return err
}

// UnmarshalJSON reads true or false.
func (f *Flag32) UnmarshalJSON(text []byte) error {
	var short Flag8
	err := short.UnmarshalJSON(text)
	*f = Flag32(short)
	return err
}

// Record tells of one pause. Times are ns; the clocks are named by their suffix, Saved and WentOn are kvmclock.
type Record struct {
	seq          uint32
	Flags        uint32 `json:"flags"` // of KVM_GET_CLOCK at the stop
	Number       uint64 `json:"number"`
	Saved        uint64 `json:"saved_ns"`
	WentOn       uint64 `json:"went_on_ns"`
	StopRaw      uint64 `json:"stop_raw_ns"`
	ContRaw      uint64 `json:"cont_raw_ns"`
	StopReal     uint64 `json:"stop_real_ns"`
	ContReal     uint64 `json:"cont_real_ns"`
	Lost         int64  `json:"lost_ns"`
	ResidualStop int64  `json:"residual_stop_ns"`
	ResidualCont int64  `json:"residual_cont_ns"`
	OrderLost    uint64 `json:"order_lost_ns"`
	Cost         uint64 `json:"cost_ns"`
	Outcome
	Ordered Flag8  `json:"ordered"`
	TSC     TSC    `json:"tsc,omitempty"`
	Error   uint64 `json:"error_ns"` // bound of what CLOCK_REALTIME was off UTC by; 0: not known
	Slept   uint64 `json:"slept_ns"` // how long the host slept in this pause
}

// Took is how long the guest stood still, ns: what stock QEMU would have taken from its clock. It is what it was measured by, and
// what the host slept meanwhile.
func (r Record) Took() uint64 { return uint64(max(r.Lost, 0)) + r.Slept }

// Import is what the guest's clock read at one instant in an earlier process, for a state that is loaded into this one.
// Times are ns.
type Import struct {
	seq   uint32
	Leg   Leg
	Clock uint64 // kvmclock
	At    uint64 // the leg's clock at that instant
	Rate  int64  // ppb by which the leg's clock ran faster than the guest's
	Error uint64 // bound of the pairing's error
	Event Event  // Migrate or Restore
	_     uint16
	Any   uint32 // 0: for a state whose clock is this very value; 1: for any
	TSC   uint64 // ticks, what the guest's TSC read at that instant
	KHz   uint32 // its frequency; 0: nothing is known of the TSC
	_     uint32
}

// Host is how good the host's clock is, written by the shim. Times are ns.
type Host struct {
	seq          uint32
	Synchronised Flag32 `json:"synchronised"`
	AtRaw        uint64 `json:"at_raw_ns"` // CLOCK_MONOTONIC_RAW when adjtimex(2) was asked
	Error        uint64 `json:"error_ns"`  // bound of CLOCK_REALTIME's error then
	_            [5]uint64
}

// Follow is the reference that a guest with Policy.Reference 1 follows, CLOCK_TAI. Times are ns.
type Follow struct {
	seq       uint32
	Known     Flag32 `json:"known"`
	Base      uint64 `json:"base_ns"`    // the reference - kvmclock as it should be
	Debt      int64  `json:"debt_ns"`    // how far the guest was behind its reference at the last cont
	Steered   int64  `json:"steered_ns"` // sum of what was steered
	Bases     uint64 `json:"bases"`
	Steps     uint64 `json:"steps"` // of CLOCK_REALTIME
	LastStep  int64  `json:"last_step_ns"`
	GivenUp   uint64 `json:"given_up"` // debts above FollowMax, which aren't followed
	LastGiven int64  `json:"last_given_ns"`
	Leaps     uint64 `json:"leaps"`  // leap seconds
	Sleeps    uint64 `json:"sleeps"` // of the host
	_         [5]uint64
}

// Clocks says which of the clocks that ftclock keeps the guest has switched on. Times are ns.
type Clocks struct {
	seq     uint32
	On      Clock  // 0: none of them
	AtRaw   uint64 // CLOCK_MONOTONIC_RAW of the last look
	Without uint64 // On 0: how long the guest has run since it was first seen so
	Looks   uint64
	Failed  uint64
	_       [3]uint64
}

// Offsets of the sections in the page, in bytes.
const (
	offHead   = 0
	offPolicy = 64
	offOrder  = 128
	offCounts = 192
	offNow    = 320
	offAnchor = 384
	offRing   = 512
	offImport = offRing + RingLen*RecordSize
	offHost   = offImport + 64
	offFollow = offHost + 64
	offClocks = offFollow + 128
)

// Leg is the host clock by which an import is carried on (enum ftclock_leg).
type Leg uint32

// The values of Leg.
const (
	LegReal Leg = iota
	LegRaw
)

func (l Leg) String() string { return name(l, []string{"CLOCK_REALTIME", "CLOCK_MONOTONIC_RAW"}) }

// Clock is one of the clocks that follow kvmclock, or several or'ed (enum ftclock_clock).
type Clock uint32

// The values of Clock.
const (
	KVMClock      Clock = 1
	HyperVPage    Clock = 2
	HyperVCounter Clock = 4
	ClockNotKnown Clock = 8
)

// Do is what is done with a pause (enum ftclock_do).
type Do uint32

// The values of Do.
const (
	CatchUp Do = 1 + iota
	Hold
)

// Event is what a pause was taken for (enum ftclock_event).
type Event uint16

// The values of Event.
const (
	NoEvent Event = iota
	Checkpoint
	Suspend
	Restore
	Migrate
	Start
)

var eventNames = []string{"none", "checkpoint", "suspend", "restore", "migrate", "start"}

func (e Event) String() string { return name(e, eventNames) }

// MarshalText gives the name.
func (e Event) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText reads a name; one that this version doesn't know is the largest value.
func (e *Event) UnmarshalText(text []byte) error { *e = value[Event](text, eventNames); return nil }

// TSC is what was done with the guest's TSC where its clock was moved (enum ftclock_tsc).
type TSC uint8

// The values of TSC.
const (
	TSCLeft    TSC = iota // the clock wasn't moved, or the guest's TSC went on with it
	TSCMoved              // moved by as much, on every vCPU
	TSCUnmoved            // it couldn't be: guests that read their time from it are where QEMU put them
)

var tscNames = []string{"left", "moved", "not moved"}

func (t TSC) String() string { return name(t, tscNames) }

// MarshalText gives the name.
func (t TSC) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads a name; one that this version doesn't know is the largest value.
func (t *TSC) UnmarshalText(text []byte) error { *t = value[TSC](text, tscNames); return nil }

// Decision is what was done with QEMU's KVM_SET_CLOCK (enum ftclock_decision).
type Decision uint16

// The values of Decision.
const (
	NoDecision Decision = iota
	Dropped
	Anchored
	Held
	Passed
)

var decisionNames = []string{"none", "dropped", "anchored", "held", "passed"}

func (d Decision) String() string { return name(d, decisionNames) }

// MarshalText gives the name.
func (d Decision) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a name; one that this version doesn't know is the largest value.
func (d *Decision) UnmarshalText(text []byte) error {
	*d = value[Decision](text, decisionNames)
	return nil
}

// Reason is why (enum ftclock_reason).
type Reason uint16

// The values of Reason.
const (
	NoReason Reason = iota
	InTolerance
	OutOfTolerance
	NeverBack
	ByThePolicy
	OverLimit
	Disabled
	NoPolicy
	First
	Unstable
	OtherValue
	Torn
	Bounds
	ReadFailed
	WriteFailed
	FromImport
	FromAnchor
)

var reasonNames = []string{
	"none",
	"the kernel's clock was right",
	"the kernel's clock was off",
	"raised so that time does not go back",
	"the policy says hold",
	"longer than its limit",
	"watching only",
	"no policy written yet",
	"no stop seen before",
	"the kernel's clock is not stable",
	"another state was loaded",
	"the page was torn",
	"a value was out of bounds",
	"reading the kernel's clock was refused",
	"writing the kernel's clock was refused",
	"a loaded state, caught up by its earlier reading",
	"a loaded state, caught up to the anchor",
}

func (r Reason) String() string { return name(r, reasonNames) }

// MarshalText gives the name.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a name; one that this version doesn't know is the largest value.
func (r *Reason) UnmarshalText(text []byte) error { *r = value[Reason](text, reasonNames); return nil }

// number is a kind of value that the page has, and that people know by its name.
type number interface{ ~uint8 | ~uint16 | ~uint32 }

// name gives a value's name, and says so of one that this version doesn't know.
func name[N number](v N, names []string) string {
	if uint64(v) < uint64(len(names)) {
		return names[v]
	}
	return "unknown (" + strconv.FormatUint(uint64(v), 10) + ")"
}

// value is the value of a name; of one that it doesn't know the largest, which has none.
func value[N number](text []byte, names []string) N {
	if i := slices.Index(names, string(text)); i >= 0 {
		return N(i)
	}
	var v N
	if _, err := fmt.Sscanf(string(text), "unknown (%d)", &v); err == nil {
		return v
	}
	return ^v
}
