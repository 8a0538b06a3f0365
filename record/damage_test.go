package record

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/control"
)

// Any damage to any file is told of, and everything else is still read.
func TestDamage(t *testing.T) {
	b := newBench(t)
	for range 200 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	name := filepath.Join(Path(b.dir, testUUID), segmentName(timeline, 1))
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	minutes := len(b.read().Minutes)
	for at := range whole {
		if at%97 != 0 && at != len(whole)-1 {
			continue
		}
		broken := append([]byte(nil), whole...)
		broken[at] ^= 1
		if err := os.WriteFile(name, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		r := b.read()
		if len(r.Problems) != 1 && len(r.Problems) != 2 || len(gaps(r, Damage)) == 0 || len(r.Minutes) < minutes-2 {
			t.Fatalf("byte %d changed: problems %v, gaps %+v, %d minutes of %d", at, r.Problems, r.Gaps, len(r.Minutes), minutes)
		}
		if !strings.Contains(r.Problems[0].String(), "left out") || !strings.Contains(r.Problems[0].String(), name) {
			t.Fatal(r.Problems[0])
		}
	}
	for size := range whole {
		if size%23 != 0 {
			continue
		}
		if err := os.WriteFile(name, whole[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		r := b.read()
		if whole[max(size-1, 0)] != '\n' && len(r.Problems) == 0 {
			t.Fatalf("cut after %d bytes, and nothing is said", size)
		}
	}
	// The next worker goes on behind a torn tail without harming it.
	torn := whole[:len(whole)-9]
	if err := os.WriteFile(name, torn, 0o600); err != nil {
		t.Fatal(err)
	}
	b.conf.Worker++
	b.begin()
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	b.write.End(EndRequest)
	r := b.read()
	if len(r.Problems) != 1 || !strings.Contains(r.Problems[0].What, "1 damaged from line") {
		t.Errorf("problems: %v", r.Problems)
	}
	now, err := os.ReadFile(name)
	if err != nil || !strings.HasPrefix(string(now), string(torn)) {
		t.Errorf("the torn file was changed: %v", err)
	}
	if g := gaps(r, Damage); g[len(g)-1].Pauses != 1200 { // the minute that the tail was
		t.Errorf("gaps: %+v", g)
	}
	if r.Minutes[len(r.Minutes)-1].Last != b.page.newest {
		t.Errorf("the last minute ends with pause %d of %d", r.Minutes[len(r.Minutes)-1].Last, b.page.newest)
	}
}

// A newer version's files stay as they are, are named, and new ones are put beside them.
func TestNewerVersion(t *testing.T) {
	b := newBench(t)
	path := Path(b.dir, testUUID)
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	newer := map[string]string{}
	for name, kind := range map[string]string{segmentName(timeline, 4): timeline, segmentName(pauses, 9): pauses, open + suffix: open} {
		text := string(appendEntry(nil, head{kindHead, formatName, Version + 1, kind, testUUID})) + "what we can't know\x00"
		newer[filepath.Join(path, name)] = text
		if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.conf.maxTimeline, b.conf.segment = 6<<10, 2<<10
	b.begin()
	for range 300 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	for name, text := range newer {
		got, err := os.ReadFile(name)
		if filepath.Base(name) == open+suffix {
			got, err = os.ReadFile(name + ".newer-1")
		}
		if err != nil || string(got) != text {
			t.Errorf("%s: %v; it is %q", name, err, got)
		}
	}
	r := b.read()
	if g := gaps(r, Newer); len(g) != 2 || !strings.Contains(g[0].Why, "newer version") || len(r.Minutes) == 0 {
		t.Errorf("gaps: %+v, %d minutes", r.Gaps, len(r.Minutes))
	}
	_, problems, err := Pauses(b.dir, testUUID, time.Time{}, time.Time{})
	if err != nil || len(problems) != 1 {
		t.Errorf("pauses: %v, %v", problems, err)
	}
}

func TestBound(t *testing.T) {
	b := newBench(t)
	b.conf.maxTimeline, b.conf.segment = 16<<10, 4<<10
	b.begin()
	for range 600 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
		var total int64
		names, _ := filepath.Glob(filepath.Join(Path(b.dir, testUUID), "*"))
		for _, name := range names {
			if info, err := os.Stat(name); err == nil && !strings.HasPrefix(filepath.Base(name), open) {
				total += info.Size()
			}
		}
		if total > (16+8)<<10 {
			t.Fatalf("%d bytes: %v", total, names)
		}
	}
	r := b.read()
	b.accounted(r)
	if len(r.Gaps) != 0 || len(r.Problems) != 0 || len(r.Minutes) < 5 || r.Minutes[0].First == 1 || r.Minutes[len(r.Minutes)-1].Last != b.page.newest {
		t.Errorf("gaps %+v, problems %v, %d minutes", r.Gaps, r.Problems, len(r.Minutes))
	}
	// A worker that takes over knows the state though the file that said it first is gone.
	if len(r.Spans) != 1 || r.Spans[0].State != control.Correcting {
		t.Errorf("spans: %+v", r.Spans)
	}
}

// Where the domain's directory can't be made, that is what is told, once.
func TestNoDirectory(t *testing.T) {
	b := newBench(t)
	if err := os.RemoveAll(b.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.dir, nil, 0o600); err != nil { // not a directory
		t.Fatal(err)
	}
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	if s := b.write.Status(); !strings.Contains(s.Problem, "mkdir ") || len(b.seen) != 1 {
		t.Errorf("status %+v, problems %v", s, b.seen)
	}
}

// A disk that takes nothing costs what it would have held, and no more: told once, and as missed pauses.
func TestNoDisk(t *testing.T) {
	b := newBench(t)
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	aside := b.dir + ".aside"
	if err := os.Rename(b.dir, aside); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.dir, nil, 0o600); err != nil { // not a directory
		t.Fatal(err)
	}
	for range 180 {
		b.pauses(20, 50*time.Millisecond)
		b.write.Collect(b.page)
	}
	if s := b.write.Status(); !strings.Contains(s.Problem, "not a directory") || len(b.seen) != 1 {
		t.Errorf("status %+v, problems %v", s, b.seen)
	}
	if err := errors.Join(os.Remove(b.dir), os.Rename(aside, b.dir)); err != nil {
		t.Fatal(err)
	}
	b.pauses(20, 50*time.Millisecond)
	b.write.Collect(b.page)
	b.write.End(EndRequest)
	if s := b.write.Status(); s.Problem != "" {
		t.Errorf("status %+v", s)
	}
	r := b.read()
	b.accounted(r)
	g := gaps(r, NotKept)
	if len(g) != 1 || !strings.Contains(g[0].Why, string(Unwritten)) || g[0].Pauses == 0 {
		t.Errorf("gaps: %+v", g)
	}
	if total := r.Total(); total.Pauses+g[0].Pauses != b.page.newest {
		t.Errorf("%d pauses and %d missed of %d", total.Pauses, g[0].Pauses, b.page.newest)
	}
}

func TestReadRefuses(t *testing.T) {
	if _, err := Read(t.TempDir(), testUUID, time.Time{}, time.Time{}); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(Path(dir, testUUID), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir, testUUID, time.Time{}, time.Time{}); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
	if all, err := Domains(dir); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
	if all, err := Domains(filepath.Join(dir, "nowhere")); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
}
