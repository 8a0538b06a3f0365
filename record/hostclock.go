package record

import "ftclock/host"

// HostClock is the state of the host's CLOCK_REALTIME as the kernel has it from whoever disciplines it (adjtimex(2)), over some
// time. Times are ns.
type HostClock struct {
	// Samples is how often the kernel was asked. 0: nothing is known.
	Samples uint64 `json:"samples"`
	// Synchronised says that it was each time.
	Synchronised bool `json:"synchronised"`
	// Offset is what was still to be corrected, where it was largest.
	Offset int64 `json:"offset_ns"`
	// EstimatedError and MaximumError are the largest. The kernel lets the latter grow by 500 ppm while nobody tells it better.
	EstimatedError int64 `json:"estimated_error_ns"`
	MaximumError   int64 `json:"maximum_error_ns"`
}

// ReadHostClock asks the kernel once.
func ReadHostClock() (HostClock, error) {
	c, err := host.ReadClock()
	if err != nil {
		return HostClock{}, err
	}
	return HostClock{Samples: 1, Synchronised: c.Synchronised, Offset: c.Offset, EstimatedError: c.EstimatedError, MaximumError: c.MaximumError}, nil
}

// Merge is the worse of both.
func (h HostClock) Merge(o HostClock) HostClock {
	switch {
	case h.Samples == 0:
		return o
	case o.Samples == 0:
		return h
	}
	if abs(o.Offset) > abs(h.Offset) {
		h.Offset = o.Offset
	}
	h.Samples += o.Samples
	h.Synchronised = h.Synchronised && o.Synchronised
	h.EstimatedError = max(h.EstimatedError, o.EstimatedError)
	h.MaximumError = max(h.MaximumError, o.MaximumError)
	return h
}
