package shim

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/test/hang"
)

// A disk that hangs, below the records and readings, keeps no domain from starting, and none from being resumed.
func TestADiskThatHangs(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	dir := hang.Dir(t)
	var log bytes.Buffer
	state := t.TempDir()
	s := &shim{Config: Config{UUID: "u", State: state, LastStops: filepath.Join(dir, "below"), Log: zerolog.New(&log)}, dir: filepath.Join(state, "u")}
	l, err := s.listen()
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if stop := s.readLastStop(); stop != nil {
		t.Errorf("it reads %+v", stop)
	}
	if n := strings.Count(log.String(), "its disk hangs"); n != 2 {
		t.Errorf("it says so %d times:\n%s", n, &log)
	}
}

// Of a reading that a full disk doesn't take, nothing is left, and it is said that a restore can't be caught up.
func TestNoRoomForTheLastStop(t *testing.T) {
	if !hang.Alone(t) {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("ftclock-test", dir, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	if err := os.WriteFile(filepath.Join(dir, "full"), make([]byte, 8192), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	f, page := newPage(t, clockpage.Minor)
	at := readInstant()
	write(t, f, 320, 2|1<<32, 1, 77e9, at.raw, at.real) // paused
	var log bytes.Buffer
	s := &shim{Config: Config{UUID: "u", LastStops: dir, Log: zerolog.New(&log)}, domain: testDomain(t, byDefault)}
	s.domain.resume(page, true)
	s.keepLastStop()
	if n := strings.Count(log.String(), `"level":"warn"`); n != 1 || !strings.Contains(log.String(), "no space left on device") {
		t.Errorf("it says:\n%s", &log)
	}
	if left, _ := filepath.Glob(dir + "/u*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.Remove(filepath.Join(dir, "full")); err != nil {
		t.Fatal(err)
	}
	s.keepLastStop()
	if s.readLastStop() == nil {
		t.Errorf("with room it isn't kept:\n%s", &log)
	}
}
