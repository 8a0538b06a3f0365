package clockpage

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

// Order is what the shim wants done with one pause, written before it lets the cont go on. Times are ns,
// CLOCK_MONOTONIC_RAW.
type Order struct {
	seq     uint32
	What    Do
	Pause   uint64 // Now.Pause when the order was written: it is good for no other
	StopRaw uint64
	ContRaw uint64
	Lost    uint64
	Event   Event
	_       uint32
	_       [2]uint64
}

// Counts are the module's counters since it was loaded.
type Counts struct {
	Pauses        uint64
	Dropped       uint64
	Anchored      uint64
	Held          uint64
	Passed        uint64
	OverLimit     uint64
	Reanchored    uint64
	StaleOrders   uint64
	Orders        uint64
	Busy          uint64
	CaughtUp      uint64 // ns
	HeldTime      uint64 // ns
	WorstResidual uint64 // ns
	WorstCost     uint64 // ns
	_             [2]uint64
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
	Valid uint32
	Epoch uint64
	Clock uint64 // kvmclock
	Raw   uint64 // CLOCK_MONOTONIC_RAW
	Real  uint64 // CLOCK_REALTIME
	Boot  uint64 // CLOCK_BOOTTIME
	Steer int64
	Error uint64
	Slept uint64 // how long the host had slept since it booted

	TSC uint64 // ticks, vCPU 0's; 0: not known
	KHz uint32 // its frequency; 0: not known, or it isn't the host's
	_   uint32
	_   [5]uint64
}

// Record tells of one pause. Times are ns; the clocks are named by their suffix, Saved and WentOn are kvmclock.
type Record struct {
	seq          uint32
	Flags        uint32
	Number       uint64
	Saved        uint64
	WentOn       uint64
	StopRaw      uint64
	ContRaw      uint64
	StopReal     uint64
	ContReal     uint64
	Lost         int64
	ResidualStop int64
	ResidualCont int64
	OrderLost    uint64
	Cost         uint64
	Decision     Decision
	Reason       Reason
	Event        EventShort
	Ordered      uint8
	TSC          TSC
	Error        uint64 // bound of what CLOCK_REALTIME was off UTC by; 0: not known
	Slept        uint64 // how long the host slept in this pause
}

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
	Any   uint32 // 0: for a state whose clock is this very value; 1: for any
	TSC   uint64 // ticks, what the guest's TSC read at that instant
	KHz   uint32 // its frequency; 0: nothing is known of the TSC
	_     uint32
}

// Host is how good the host's clock is, written by the shim. Times are ns.
type Host struct {
	seq          uint32
	Synchronised uint32
	AtRaw        uint64 // CLOCK_MONOTONIC_RAW when adjtimex(2) was asked
	Error        uint64 // bound of CLOCK_REALTIME's error then
	_            [5]uint64
}

// Follow is the reference that a guest with Policy.Reference 1 follows, CLOCK_TAI. Times are ns.
type Follow struct {
	seq       uint32
	Known     uint32
	Base      uint64 // the reference - kvmclock as it should be
	Debt      int64  // how far the guest was behind its reference at the last cont
	Steered   int64  // sum of what was steered
	Bases     uint64
	Steps     uint64 // of CLOCK_REALTIME
	LastStep  int64
	GivenUp   uint64 // debts above FollowMax, which aren't followed
	LastGiven int64
	Leaps     uint64 // leap seconds
	Sleeps    uint64 // of the host
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

func (l Leg) String() string { return name(int(l), "CLOCK_REALTIME", "CLOCK_MONOTONIC_RAW") }

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
	ByPolicy Do = iota // orders only: as the standing policy says
	CatchUp
	Hold
)

func (d Do) String() string { return name(int(d), "policy", "catch-up", "hold") }

// Event is what a pause was taken for (enum ftclock_event).
type Event uint32

// The values of Event.
const (
	NoEvent Event = iota
	Checkpoint
	Suspend
	Restore
	Migrate
	Start
)

func (e Event) String() string {
	return name(int(e), "none", "checkpoint", "suspend", "restore", "migrate", "start")
}

// EventShort is an Event in the 16 bits that a record has for it.
type EventShort uint16

func (e EventShort) String() string { return Event(e).String() }

// TSC is what was done with the guest's TSC where its clock was moved (enum ftclock_tsc).
type TSC uint8

// The values of TSC.
const (
	TSCLeft    TSC = iota // the clock wasn't moved, or the guest's TSC went on with it
	TSCMoved              // moved by as much, on every vCPU
	TSCUnmoved            // it couldn't be: guests that read their time from it are where QEMU put them
)

func (t TSC) String() string { return name(int(t), "left", "moved", "not moved") }

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

func (d Decision) String() string {
	return name(int(d), "none", "dropped", "anchored", "held", "passed")
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

func (r Reason) String() string {
	return name(int(r), "none",
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
		"a loaded state, caught up to the anchor")
}
