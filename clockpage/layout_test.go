package clockpage

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// mirrors are Go's types of the header's sections.
var mirrors = map[string]reflect.Type{
	"head":   reflect.TypeFor[Head](),
	"policy": reflect.TypeFor[Policy](),
	"order":  reflect.TypeFor[Order](),
	"counts": reflect.TypeFor[Counts](),
	"now":    reflect.TypeFor[Now](),
	"anchor": reflect.TypeFor[Anchor](),
	"record": reflect.TypeFor[Record](),
	"import": reflect.TypeFor[Import](),
	"host":   reflect.TypeFor[Host](),
	"follow": reflect.TypeFor[Follow](),
	"clocks": reflect.TypeFor[Clocks](),
}

// Names that differ by more than their spelling.
var otherNames = map[string]string{"caughtupns": "caughtup", "heldns": "heldtime", "passedns": "passedtime"}

// named are the fields of a mirror that aren't reserved.
func named(typ reflect.Type) []reflect.StructField {
	fields := reflect.VisibleFields(typ)
	for i, f := range fields {
		if len(f.Index) > 1 { // a part of an embedded one, whose offset is its own
			fields[i].Offset += typ.FieldByIndex(f.Index[:len(f.Index)-1]).Offset
		}
	}
	return slices.DeleteFunc(fields, func(f reflect.StructField) bool { return f.Name == "_" || f.Anonymous })
}

func TestLayoutIsTheHeaders(t *testing.T) {
	lines := map[string][]string{}
	for _, words := range runPeer(t, nil, "layout") {
		lines[words[0]] = words[1:]
	}
	for _, s := range peer.header.sections {
		typ, ok := mirrors[s.name]
		if !ok {
			t.Errorf("struct ftclock_%s has no mirror", s.name)
			continue
		}
		if got := fmt.Sprint(typ.Size()); got != lines[s.name][0] {
			t.Errorf("%s has %s bytes, want %s", typ, got, lines[s.name][0])
		}
		if typ.Size()%64 != 0 {
			t.Errorf("%s is %d bytes, not whole cache lines", typ, typ.Size())
		}
		fields := named(typ)
		for _, m := range s.members {
			if strings.HasPrefix(m, "reserved") {
				continue
			}
			if len(fields) == 0 {
				t.Errorf("%s lacks %s", typ, m)
				continue
			}
			f := fields[0]
			fields = fields[1:]
			want := strings.ReplaceAll(m, "_", "")
			if other, ok := otherNames[want]; ok {
				want = other
			}
			if got := strings.ToLower(f.Name); got != want {
				t.Errorf("%s.%s stands where the header has %s", typ, f.Name, m)
			}
			at := lines[s.name+"."+m]
			if fmt.Sprint(f.Offset) != at[0] || fmt.Sprint(f.Type.Size()) != at[1] {
				t.Errorf("%s.%s is at %d with %d bytes, want %s with %s", typ, f.Name, f.Offset, f.Type.Size(), at[0], at[1])
			}
		}
		for _, f := range fields {
			t.Errorf("%s.%s is not in the header", typ, f.Name)
		}
	}
	if got := lines["FTCLOCK_PAGE_NAME"][0]; got != Name {
		t.Errorf("Name is %q, want %q", Name, got)
	}
}

// values are Go's of the header's constants and enumerators.
var values = map[string]uint64{
	"FTCLOCK_PAGE_MAGIC": Magic,
	"FTCLOCK_PAGE_MAJOR": Major,
	"FTCLOCK_PAGE_MINOR": Minor,
	"FTCLOCK_PAGE_SIZE":  Size,
	"FTCLOCK_RING_LEN":   RingLen,
	"FTCLOCK_LIMIT_MAX":  LimitMax,
	"FTCLOCK_TOLERANCE":  Tolerance,
	"FTCLOCK_FOLLOW_MAX": FollowMax,
	"FTCLOCK_SLEW_MAX":   SlewMax,

	"FTCLOCK_DO_CATCH_UP": uint64(CatchUp),
	"FTCLOCK_DO_HOLD":     uint64(Hold),

	"FTCLOCK_TSC_LEFT":    uint64(TSCLeft),
	"FTCLOCK_TSC_MOVED":   uint64(TSCMoved),
	"FTCLOCK_TSC_UNMOVED": uint64(TSCUnmoved),

	"FTCLOCK_LEG_REAL": uint64(LegReal),
	"FTCLOCK_LEG_RAW":  uint64(LegRaw),

	"FTCLOCK_CLOCK_KVMCLOCK":       uint64(KVMClock),
	"FTCLOCK_CLOCK_HYPERV_PAGE":    uint64(HyperVPage),
	"FTCLOCK_CLOCK_HYPERV_COUNTER": uint64(HyperVCounter),
	"FTCLOCK_CLOCK_NOT_KNOWN":      uint64(ClockNotKnown),

	"FTCLOCK_EVENT_NONE":       uint64(NoEvent),
	"FTCLOCK_EVENT_CHECKPOINT": uint64(Checkpoint),
	"FTCLOCK_EVENT_SUSPEND":    uint64(Suspend),
	"FTCLOCK_EVENT_RESTORE":    uint64(Restore),
	"FTCLOCK_EVENT_MIGRATE":    uint64(Migrate),
	"FTCLOCK_EVENT_START":      uint64(Start),

	"FTCLOCK_NOTHING":  uint64(NoDecision),
	"FTCLOCK_DROPPED":  uint64(Dropped),
	"FTCLOCK_ANCHORED": uint64(Anchored),
	"FTCLOCK_HELD":     uint64(Held),
	"FTCLOCK_PASSED":   uint64(Passed),

	"FTCLOCK_REASON_NONE":             uint64(NoReason),
	"FTCLOCK_REASON_IN_TOLERANCE":     uint64(InTolerance),
	"FTCLOCK_REASON_OUT_OF_TOLERANCE": uint64(OutOfTolerance),
	"FTCLOCK_REASON_NEVER_BACK":       uint64(NeverBack),
	"FTCLOCK_REASON_POLICY":           uint64(ByThePolicy),
	"FTCLOCK_REASON_OVER_LIMIT":       uint64(OverLimit),
	"FTCLOCK_REASON_DISABLED":         uint64(Disabled),
	"FTCLOCK_REASON_NO_POLICY":        uint64(NoPolicy),
	"FTCLOCK_REASON_FIRST":            uint64(First),
	"FTCLOCK_REASON_UNSTABLE":         uint64(Unstable),
	"FTCLOCK_REASON_OTHER_VALUE":      uint64(OtherValue),
	"FTCLOCK_REASON_TORN":             uint64(Torn),
	"FTCLOCK_REASON_BOUNDS":           uint64(Bounds),
	"FTCLOCK_REASON_READ_FAILED":      uint64(ReadFailed),
	"FTCLOCK_REASON_WRITE_FAILED":     uint64(WriteFailed),
	"FTCLOCK_REASON_FROM_IMPORT":      uint64(FromImport),
	"FTCLOCK_REASON_FROM_ANCHOR":      uint64(FromAnchor),
}

// moduleOnly are constants that only the module needs.
var moduleOnly = []string{"FTCLOCK_REANCHOR"}

func TestValuesAreTheHeaders(t *testing.T) {
	seen := 0
	for _, words := range runPeer(t, nil, "layout") {
		name := words[0]
		if !strings.HasPrefix(name, "FTCLOCK_") || name == "FTCLOCK_PAGE_NAME" || slices.Contains(moduleOnly, name) {
			continue
		}
		seen++
		got, ok := values[name]
		if !ok {
			t.Errorf("%s has no counterpart in Go", name)
		} else if fmt.Sprint(got) != words[1] {
			t.Errorf("%s is %s, Go says %d", name, words[1], got)
		}
	}
	if seen != len(values) {
		t.Errorf("the header has %d values, Go %d", seen, len(values))
	}
}

// Every value of the header has a name for people; the next one, and the largest, are told as unknown.
func TestStrings(t *testing.T) {
	runPeer(t, nil, "layout")
	kinds := map[string]func(uint64) string{
		"tsc":      func(v uint64) string { return TSC(v).String() },
		"leg":      func(v uint64) string { return Leg(v).String() },
		"event":    func(v uint64) string { return Event(v).String() },
		"decision": func(v uint64) string { return Decision(v).String() },
		"reason":   func(v uint64) string { return Reason(v).String() },
	}
	widest := map[string]uint64{"tsc": 255, "leg": 1<<32 - 1, "event": 1<<16 - 1, "decision": 1<<16 - 1, "reason": 1<<16 - 1}
	for kind, text := range kinds {
		n := uint64(len(peer.header.enums[kind]))
		texts := map[string]bool{}
		for v := range n {
			s := text(v)
			if s == "" || strings.HasPrefix(s, "unknown") || texts[s] {
				t.Errorf("%s %d is %q", kind, v, s)
			}
			texts[s] = true
		}
		for _, v := range []uint64{n, widest[kind]} {
			if got, want := text(v), "unknown ("+strconv.FormatUint(v, 10)+")"; got != want {
				t.Errorf("%s %d is %q, want %q", kind, v, got, want)
			}
		}
	}
}
