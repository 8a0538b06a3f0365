package wholehost

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"ftclock/test/check"
)

// A host that lost power starts its managed domains again, and they are served: whatever the last boot left in libvirt's
// directories is no obstacle, although libvirt counts its starts from 1 again. FTCLOCK_CUTS is how often.
func TestKVMPowerCuts(t *testing.T) {
	cuts, domains := check.Count(t, "FTCLOCK_CUTS", 1), 2
	if os.Getenv("FTCLOCK_CUTS") != "" {
		domains = 4
	}
	random, _ := check.Random(t)
	h := boot(t)
	var names []string
	for i := range domains {
		names = append(names, fmt.Sprintf("web%d", i+1))
		h.define(names[i])
		h.must("virsh", "start", names[i])
	}
	h.keepTime(names, 20)
	h.must("sync") // definitions and packages are there for good, as a host's are after a while
	for cut := range cuts {
		h.leftovers(names)
		if cuts > 1 {
			go func(h *host) {
				_, _ = h.Run("ftclock", "exercise", names[0], "--rate", "10", "--pause", "5", "--count", "1000")
			}(&host{Host: h.Host, t: t})
			time.Sleep(time.Duration(random.IntN(20_000)) * time.Millisecond)
		}
		h.Cut()
		h.plug()
		h.keepTime(names, 20)
		h.records(names)
		if t.Failed() {
			t.Fatalf("after cut %d", cut+1)
		}
	}
}

// leftovers checks that a cut will leave what this is about.
func (h *host) leftovers(names []string) {
	h.t.Helper()
	if out := h.must("sh", "-c", "sync; ls -d /var/lib/libvirt/qemu/domain-*/monitor.qemu"); strings.Count(out, "\n") < len(names) {
		h.t.Errorf("QEMU's sockets: %s", out)
	}
}

// records checks that everything up to the last minute before a cut can be read.
func (h *host) records(names []string) {
	h.t.Helper()
	for _, name := range names {
		if out, err := h.Run("ftclock", "report", name); err != nil || strings.Contains(out, "damaged") {
			h.t.Errorf("the record of %s: %v\n%s", name, err, out)
		}
	}
}
