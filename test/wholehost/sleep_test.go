package wholehost

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/packages"
)

// A host sleeps (suspend to RAM), while two guests run and in pauses of the second, which is managed. The first is the twin that is never
// paused: whatever the kernel makes of a sleep, the second one's clock has to read the same. Short sleeps are in it because a host counts
// by a clock of whole seconds.
func TestKVMTheHostSleeps(t *testing.T) {
	h := newHost(t)
	h.options.OnDisk, h.options.Read = true, nil
	h.plug()
	h.give("packages/"+packages.DebName(packages.Tags[0]), built.Guest, "clock")
	h.install()
	h.defineWith(twin, "")
	h.define(kept)
	for _, name := range twins {
		h.must("virsh", "start", name)
	}
	h.sleeps([]sleep{{8 * time.Second, false}, {0, false}, {0, true}})
	h.must("sync")
	h.Cut()
	h.plug() // for another long one
	h.sleeps([]sleep{{8 * time.Second, true}, {0, true}})
}

const twin, kept = "twin", "kept"

var twins = []string{twin, kept}

type sleep struct {
	length  time.Duration // or more; 0: as short as can be
	inPause bool
}

// sleeps has the host sleep, and compares the guests' clocks after each sleep and the pauses behind it.
func (h *host) sleeps(all []sleep) {
	h.t.Helper()
	h.running(twins)
	h.exercise(kept)
	begin := h.read(twins)
	before := begin
	compare := func(when string) {
		h.t.Helper()
		now := h.read(twins)
		took := func(name string) int64 { return before[name].offset - now[name].offset }
		apart := func(r map[string]reading) int64 { return r[kept].offset - r[twin].offset }
		h.t.Logf("%s: the host slept %.6f ms by its own count, %.6f ms by the guest that isn't paused, whose clock the other's differs from by %d ns",
			when, ms(now[twin].slept-before[twin].slept), ms(took(twin)), apart(now)-apart(begin))
		check.Within(h.t, apart(now)-apart(begin), guest.MaxDrift, "%s, against its twin", when)
		before = now
	}
	for _, s := range all {
		if s.inPause {
			h.must("virsh", "suspend", kept)
		}
		check.NoError(h.t, h.Sleep(s.length))
		if s.inPause {
			h.must("virsh", "resume", kept)
		}
		compare(fmt.Sprintf("%+v", s))
		h.exercise(kept)
		compare("behind 20 pauses")
	}
	if s := h.status(kept); s.Reanchored != 0 || s.Anchored != 0 || s.Passed != 1 { // that is its start
		h.t.Errorf("anchored anew %d, anchored %d, passed %d, want 0, 0 and 1", s.Reanchored, s.Anchored, s.Passed)
	}
}

// give copies files of build/test to a host that sees none of this machine's.
func (h *host) give(names ...string) {
	h.t.Helper()
	for _, name := range names {
		text := check.Value(os.ReadFile(check.Value(built.Path(name))(h.t)))(h.t)
		path := filepath.Join(tools, name)
		if out, err := h.Feed(text, "sh", "-c", "mkdir -p "+filepath.Dir(path)+" && cat >"+path+" && chmod 755 "+path); err != nil {
			h.t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
}
