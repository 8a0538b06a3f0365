package guest

// MaxDrift is what a guest's clock may be off by after any number of pauses, ns. What ftclock leaves is below a
// microsecond; the rest is the reading from outside, which is late by some microseconds where the machine is busy. A
// clock that loses its pauses is off by more after the first of them.
const MaxDrift = 10_000

// Off tells whether a clock is off by more than MaxDrift, in either direction.
func Off(drift int64) bool { return drift > MaxDrift || drift < -MaxDrift }
