package clockpage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var goodHead = Head{
	Magic: Magic, Major: Major, Minor: Minor, Size: Size, RingLen: RingLen, RecordSize: RecordSize, PID: 4711,
}

func writeHead(t testing.TB, f *os.File, h Head) {
	t.Helper()
	b, err := binary.Append(nil, binary.LittleEndian, h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// nth gives values that differ from each other in each 16 bits, as testdata/peer.c does.
func nth(n uint64) uint64 { return n * 0x0001000300050007 }

// set stores v in a field of any width.
func set(field reflect.Value, v uint64) {
	bits := field.Type().Bits()
	if field.CanInt() {
		field.SetInt(int64(v << (64 - bits) >> (64 - bits)))
	} else {
		field.SetUint(v << (64 - bits) >> (64 - bits))
	}
}

// get reads a field of any width.
func get(field reflect.Value) uint64 {
	if field.CanInt() {
		return uint64(field.Int())
	}
	return field.Uint()
}

// narrow cuts v to a field's width.
func narrow(field reflect.Value, v uint64) uint64 {
	bits := field.Type().Bits()
	return v << (64 - bits) >> (64 - bits)
}

// distinct fills all fields of *section but seq, each with its own value.
func distinct(section any) {
	v := reflect.ValueOf(section).Elem()
	for i, f := range named(v.Type()) {
		if f.IsExported() {
			set(v.FieldByIndex(f.Index), nth(uint64(i+1)))
		}
	}
}

func TestModuleReadsWhatWeWrite(t *testing.T) {
	p, f := newPage(t)
	var policy Policy
	var order Order
	distinct(&policy)
	distinct(&order)
	var imported Import
	distinct(&imported)
	var host Host
	distinct(&host)
	for range 3 { // the sequence grows
		p.SetPolicy(policy)
		p.SetOrder(order)
		p.SetImport(imported)
		p.SetHost(host)
	}
	got := map[string]string{}
	for _, words := range runPeer(t, f, "dump") {
		got[words[0]] = words[1]
	}
	for name, section := range map[string]any{"policy": policy, "order": order, "import": imported, "host": host} {
		v := reflect.ValueOf(section)
		for i, m := range sectionOf(t, name) {
			want := fmt.Sprint(get(v.FieldByIndex(named(v.Type())[i].Index)))
			if m == "seq" {
				want = "6"
			}
			if got[name+"."+m] != want {
				t.Errorf("%s.%s is %s, want %s", name, m, got[name+"."+m], want)
			}
		}
	}
	backPolicy, err := p.Policy()
	backPolicy.seq = 0
	if err != nil || backPolicy != policy {
		t.Errorf("policy read back: %+v, %v; want %+v", backPolicy, err, policy)
	}
	backOrder, err := p.Order()
	backOrder.seq = 0
	if err != nil || backOrder != order {
		t.Errorf("order read back: %+v, %v; want %+v", backOrder, err, order)
	}
}

// sectionOf gives the members of a section that aren't reserved.
func sectionOf(t *testing.T, name string) []string {
	t.Helper()
	for _, s := range peer.header.sections {
		if s.name == name {
			var names []string
			for _, m := range s.members {
				if !strings.HasPrefix(m, "reserved") {
					names = append(names, m)
				}
			}
			return names
		}
	}
	t.Fatalf("the header has no section %q", name)
	return nil
}

func TestWeReadWhatTheModuleWrites(t *testing.T) {
	f := memfd(t, Size, moduleSeals)
	runPeer(t, f, "fill")
	p, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()

	h, err := p.Head()
	want := goodHead
	want.LoadedRaw = nth(1)
	if err != nil || h != want {
		t.Errorf("head is %+v, %v; want %+v", h, err, want)
	}
	now, err := p.Now()
	if err != nil {
		t.Error(err)
	}
	anchor, err := p.Anchor()
	if err != nil {
		t.Error(err)
	}
	record, err := p.Record(200)
	if err != nil {
		t.Error(err)
	}
	follow, err := p.Follow()
	if err != nil {
		t.Error(err)
	}
	clocks, err := p.Clocks()
	if err != nil {
		t.Error(err)
	}
	for _, section := range []any{p.Counts(), now, anchor, record, follow, clocks} {
		v := reflect.ValueOf(section)
		for i, f := range named(v.Type()) {
			field := v.FieldByIndex(f.Index)
			want := narrow(field, nth(uint64(i+1)))
			switch f.Name {
			case "seq":
				want = 2
			case "Number":
				want = 200
			}
			if got := get(field); got != want {
				t.Errorf("%s.%s is %#x, want %#x", v.Type(), f.Name, got, want)
			}
		}
	}
}

// oneGeneration checks that all fields but seq carry one number.
func oneGeneration(t *testing.T, section any, generation uint64) {
	t.Helper()
	v := reflect.ValueOf(section)
	for _, f := range named(v.Type()) {
		field := v.FieldByIndex(f.Index)
		if want := narrow(field, generation); f.Name != "seq" && get(field) != want {
			t.Fatalf("%s.%s is %d in a reading of generation %d: torn", v.Type(), f.Name, get(field), want)
		}
	}
}

// patience bounds the tests' loops: they end by what they see.
const patience = time.Minute

func TestWeNeverReadTwoGenerations(t *testing.T) {
	f := memfd(t, Size, moduleSeals)
	runPeer(t, f, "fill")
	p, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	cmd := startPeer(t, f, "storm")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	// What fill left has distinct values: wait for the first generation.
	for end := time.Now().Add(patience); ; {
		if now, err := p.Now(); err == nil && now.Pause == now.Saved {
			break
		} else if time.Now().After(end) {
			t.Fatal("the writer never started")
		}
	}

	const want, wantChanges = 20_000, 200
	whole, torn, changes := 0, 0, 0
	var last uint64
	for end := time.Now().Add(patience); whole < want || changes < wantChanges; {
		if time.Now().After(end) {
			t.Fatalf("%d readings whole, %d torn, %d changes: too little contention, or too much", whole, torn, changes)
		}
		now, err := p.Now()
		anchor, err2 := p.Anchor()
		var record Record
		err3 := read(unsafe.Pointer(&record), p.at(offRing), unsafe.Sizeof(record))
		follow, err4 := p.Follow()
		clocks, err5 := p.Clocks()
		if err := errors.Join(err, err2, err3, err4, err5); err != nil {
			if !errors.Is(err, ErrTorn) {
				t.Fatal(err)
			}
			torn++
			continue
		}
		whole++
		if now.Pause != last {
			changes++
		}
		last = now.Pause
		oneGeneration(t, now, now.Pause)
		oneGeneration(t, anchor, anchor.Clock)
		oneGeneration(t, record, record.Number)
		oneGeneration(t, follow, follow.Base)
		oneGeneration(t, clocks, clocks.AtRaw)
	}
	t.Logf("%d readings whole, %d torn, %d changes", whole, torn, changes)
}

func TestModuleNeverReadsTwoGenerations(t *testing.T) {
	p, f := newPage(t)
	cmd := startPeer(t, f, "watch", "200")
	var policy Policy
	var order Order
	fill := func(section any, generation uint64) {
		v := reflect.ValueOf(section).Elem()
		for _, f := range named(v.Type()) {
			if f.IsExported() {
				set(v.FieldByIndex(f.Index), generation)
			}
		}
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for generation := uint64(1); ; generation++ {
		fill(&policy, generation)
		fill(&order, generation)
		p.SetPolicy(policy)
		p.SetOrder(order)
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("peer watch: %v", err)
			}
			var whole, torn, changes int
			if _, err := fmt.Sscanf(out.String(), "%d whole, %d torn, %d changes", &whole, &torn, &changes); err != nil {
				t.Fatal(err)
			}
			if changes < 200 {
				t.Errorf("the page changed %d times during %d readings: no contention", changes, whole)
			}
			t.Log(strings.TrimSpace(out.String()))
			return
		default:
		}
	}
}

func TestWriterStuckAtOdd(t *testing.T) {
	p, _ := newPage(t)
	for _, c := range []struct {
		name string
		off  uintptr
		read func() error
	}{
		{"policy", offPolicy, func() error { _, err := p.Policy(); return err }},
		{"order", offOrder, func() error { _, err := p.Order(); return err }},
		{"now", offNow, func() error { _, err := p.Now(); return err }},
		{"anchor", offAnchor, func() error { _, err := p.Anchor(); return err }},
		{"record", offRing, func() error { _, err := p.Record(1); return err }},
	} {
		atomic.StoreUint32((*uint32)(p.at(c.off)), 7)
		if err := c.read(); err != ErrTorn {
			t.Errorf("%s: %v, want %v", c.name, err, ErrTorn)
		}
	}
	// A writer that takes over from one that died in the middle leaves a whole section.
	p.SetPolicy(Policy{Enabled: 1})
	p.SetOrder(Order{Pause: 3})
	if v, err := p.Policy(); err != nil || v.Enabled != 1 || v.seq != 8 {
		t.Errorf("policy after a dead writer: %+v, %v", v, err)
	}
	if v, err := p.Order(); err != nil || v.Pause != 3 || v.seq != 8 {
		t.Errorf("order after a dead writer: %+v, %v", v, err)
	}
	atomic.StoreUint32((*uint32)(p.at(offRing)), 8)
	if got := p.Last(5); len(got) != 0 {
		t.Errorf("records without a pause: %+v", got)
	}
}

// The sequence skips 0, which says that nothing was ever written.
func TestSequenceWraps(t *testing.T) {
	p, _ := newPage(t)
	atomic.StoreUint32((*uint32)(p.at(offPolicy)), 1<<32-2)
	p.SetPolicy(Policy{Enabled: 1})
	if v, err := p.Policy(); err != nil || v.seq != 2 {
		t.Errorf("policy after the sequence's end: %+v, %v", v, err)
	}
}

func TestNotYet(t *testing.T) {
	p, _ := newPage(t)
	if _, err := p.Policy(); err != ErrNotYet {
		t.Errorf("policy: %v", err)
	}
	if _, err := p.Order(); err != ErrNotYet {
		t.Errorf("order: %v", err)
	}
	if v, err := p.Anchor(); err != nil || v.Valid != 0 {
		t.Errorf("anchor: %+v, %v", v, err)
	}
	if v, err := p.Now(); err != nil || v.Paused != 0 {
		t.Errorf("now: %+v, %v", v, err)
	}
	if _, err := p.Record(1); err != ErrNotYet {
		t.Errorf("record 1: %v", err)
	}
	if _, err := p.Record(0); err != ErrStale {
		t.Errorf("record 0: %v", err)
	}
	if got := p.Last(10); len(got) != 0 {
		t.Errorf("records: %+v", got)
	}
}

// putRecord does what the module does at the end of pause number.
func putRecord(p *Page, number uint64) {
	r := Record{Number: number}
	write(p.at(offRing+uintptr((number-1)%RingLen)*RecordSize), unsafe.Pointer(&r), unsafe.Sizeof(r))
	atomic.StoreUint64((*uint64)(p.at(offCounts)), number)
}

func TestRing(t *testing.T) {
	p, _ := newPage(t)
	for n := uint64(1); n <= 300; n++ {
		putRecord(p, n)
	}
	for number, want := range map[uint64]error{
		44: ErrStale, 45: nil, 256: nil, 257: nil, 300: nil, 301: ErrNotYet, 1 << 60: ErrNotYet, ^uint64(0): ErrNotYet,
	} {
		if r, err := p.Record(number); err != want || (err == nil && r.Number != number) {
			t.Errorf("record %d: %d, %v; want %v", number, r.Number, err, want)
		}
	}
	for _, c := range []struct{ max, first, n int }{{0, 0, 0}, {1, 300, 1}, {10, 291, 10}, {256, 45, 256}, {1000, 45, 256}} {
		got := p.Last(c.max)
		if len(got) != c.n || (c.n > 0 && (got[0].Number != uint64(c.first) || got[c.n-1].Number != 300)) {
			t.Errorf("Last(%d): %d records, want %d from %d", c.max, len(got), c.n, c.first)
		}
	}
	// One that is being written is left out.
	atomic.StoreUint32((*uint32)(p.at(offRing+uintptr(299%RingLen)*RecordSize)), 3)
	if got := p.Last(2); len(got) != 1 || got[0].Number != 299 {
		t.Errorf("Last with a torn record: %+v", got)
	}
}

func TestLastAtTheEndOfTheCount(t *testing.T) {
	p, _ := newPage(t)
	putRecord(p, ^uint64(0))
	if got := p.Last(1000); len(got) != 1 || got[0].Number != ^uint64(0) {
		t.Errorf("records: %+v", got)
	}
}

func TestMapRefuses(t *testing.T) {
	head := func(change func(*Head)) func() *os.File {
		return func() *os.File {
			f := memfd(t, Size, moduleSeals)
			h := goodHead
			change(&h)
			writeHead(t, f, h)
			return f
		}
	}
	for _, c := range []struct {
		name string
		file func() *os.File
		want string
	}{
		{"not ready", func() *os.File { return memfd(t, Size, moduleSeals) }, ErrNotYet.Error()},
		{"other magic", head(func(h *Head) { h.Magic++ }), ErrNotYet.Error()},
		{"other major", head(func(h *Head) { h.Major = 2; h.Minor = 7 }), "clock page has version 2.7, this program knows 1"},
		{"other size", head(func(h *Head) { h.Size = 4096 }), "wrong shape: 4096 bytes, 256 records of 128"},
		{"other ring", head(func(h *Head) { h.RingLen = 0 }), "wrong shape: 36864 bytes, 0 records of 128"},
		{"other records", head(func(h *Head) { h.RecordSize = 0 }), "wrong shape: 36864 bytes, 256 records of 0"},
		{"unsealed", func() *os.File { return memfd(t, Size, 0) }, "not sealed against shrinking"},
		{"sealed against growing only", func() *os.File { return memfd(t, Size, unix.F_SEAL_GROW) }, "not sealed against shrinking"},
		{"too small", func() *os.File { return memfd(t, Size-1, moduleSeals) }, "clock page has 36863 bytes, want 36864"},
		{"empty", func() *os.File { return memfd(t, 0, moduleSeals) }, "clock page has 0 bytes"},
		{"read-only by seal", func() *os.File { return memfd(t, Size, moduleSeals|unix.F_SEAL_WRITE) }, "mapping the clock page: mmap:"},
		{"pipe", func() *os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
			return r
		}, "reading the clock page's seals: fcntl:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.file()
			before, err := openPages()
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if p, err := Map(f); err == nil {
					t.Errorf("mapped")
					_ = p.Close()
				} else if !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
			}
			if after, err := openPages(); err != nil || after != before {
				t.Errorf("%d files and mappings of pages before, %d after (%v)", before, after, err)
			}
		})
	}
	// A newer minor, and a bigger file, are a later version's that we know enough of.
	f := memfd(t, 2*Size, moduleSeals)
	h := goodHead
	h.Minor = 9
	writeHead(t, f, h)
	p, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// A file that the caller closes leaves the page mapped; one that is closed already is an error.
func TestMapAndFile(t *testing.T) {
	f := memfd(t, Size, moduleSeals)
	writeHead(t, f, goodHead)
	p, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if h, err := p.Head(); err != nil || h.PID != 4711 {
		t.Errorf("head: %+v, %v", h, err)
	}
	if p, err := Map(f); err == nil {
		t.Error("mapped a closed file")
		_ = p.Close()
	}
}

// FuzzPage gives readers a page of somebody else's making: every word can be anything at any moment.
func FuzzPage(f *testing.F) {
	ones := make([]byte, Size)
	for i := range ones {
		ones[i] = 0xff
	}
	f.Add([]byte{}, true, uint64(0))
	f.Add(ones, true, ^uint64(0))
	f.Add(ones, false, ^uint64(0))
	f.Add([]byte{2, 0, 0, 0}, true, uint64(1<<63))
	f.Add([]byte("FTCLOCK1\x01\x00\x00\x00"), false, uint64(257))
	f.Fuzz(func(t *testing.T, data []byte, withHead bool, number uint64) {
		page := make([]byte, Size)
		for at := 0; at < Size && len(data) > 0; {
			at += copy(page[at:], data)
		}
		file := memfd(t, Size, moduleSeals)
		if _, err := file.WriteAt(page, 0); err != nil {
			t.Fatal(err)
		}
		if withHead {
			writeHead(t, file, goodHead)
		}
		p, err := Map(file)
		if err != nil {
			return
		}
		defer func() { _ = p.Close() }()
		policy, _ := p.Policy()
		order, _ := p.Order()
		now, _ := p.Now()
		anchor, _ := p.Anchor()
		record, err := p.Record(number)
		if err == nil && record.Number != number {
			t.Errorf("record %d for %d", record.Number, number)
		}
		for _, max := range []int{-1, 0, 1, RingLen, RingLen + 1, 1 << 62} {
			got := p.Last(max)
			if len(got) > RingLen || (max >= 0 && len(got) > max) {
				t.Errorf("Last(%d) gave %d records", max, len(got))
			}
			for i, r := range got {
				if i > 0 && r.Number <= got[i-1].Number {
					t.Errorf("Last(%d) gave %d after %d", max, r.Number, got[i-1].Number)
				}
			}
		}
		atomic.StoreUint64((*uint64)(p.at(offCounts)), ^uint64(0))
		p.Last(RingLen)
		_ = fmt.Sprintf("%+v %+v %+v %+v %+v %+v", policy, order, now, anchor, record, p.Counts())
		// Whatever was in there, the shim's own sections are good once it has written them.
		p.SetPolicy(Policy{SuspendLimit: number})
		p.SetOrder(Order{Lost: number})
		if v, err := p.Policy(); err != nil || v.SuspendLimit != number {
			t.Errorf("policy read back: %+v, %v", v, err)
		}
		if v, err := p.Order(); err != nil || v.Lost != number {
			t.Errorf("order read back: %+v, %v", v, err)
		}
	})
}
