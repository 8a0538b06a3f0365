package guest

import (
	"math"
	"time"
)

// RealtimeAhead is how far the host's CLOCK_REALTIME is ahead of its CLOCK_MONOTONIC_RAW, ns: by the best of some readings, since
// CLOCK_REALTIME was read at some time between two of CLOCK_MONOTONIC_RAW.
func RealtimeAhead() (ahead int64) {
	shortest := int64(math.MaxInt64)
	for range 100 {
		before := Raw()
		real := time.Now().UnixNano()
		if took := Raw() - before; took < shortest {
			shortest, ahead = took, real-before-took/2
		}
	}
	return ahead
}
