package record

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftclock/host"
	"ftclock/test/check"
)

func TestExpire(t *testing.T) {
	own := check.Value(host.ReadStat(os.Getpid()))(t)
	now := time.Now()
	old, young := now.Add(-Kept-time.Hour), now.Add(-Kept+time.Hour)
	dir := t.TempDir()
	served := func(uuid string) bool { return uuid == host.ProcessUUID(1<<22+3, 7) }
	check.NoError(t, os.WriteFile(filepath.Join(dir, host.ProcessUUID(3, 3)), nil, 0o600)) // no record
	for _, c := range []struct {
		name    string
		written time.Time
		stays   bool
	}{
		{host.ProcessUUID(os.Getpid(), own.Started+1), old, false}, // another process has its pid
		{host.ProcessUUID(1<<22+1, 7), old, false},                 // beyond any pid
		{host.ProcessUUID(1<<22+2, 7), young, true},
		{host.ProcessUUID(1<<22+3, 7), old, true}, // a shim has it
		{host.ProcessUUID(os.Getpid(), own.Started), old, true},
		{"7b3bf8a5-1d1f-4d4a-9cd2-a7a50d0a4bd6", old, true},
		{"pid-1-x", old, true},
		{"elsewhere", old, true},
	} {
		path := filepath.Join(dir, c.name)
		check.NoError(t, os.Mkdir(path, 0o700))
		file := filepath.Join(path, "open.log")
		check.NoError(t, os.WriteFile(file, nil, 0o600))
		check.NoError(t, os.Chtimes(file, c.written, c.written))
		check.NoError(t, os.Chtimes(path, old, old))
		check.NoError(t, Expire(dir, now, served))
		if _, err := os.Stat(path); (err == nil) != c.stays {
			t.Errorf("%s, %v old: %v", c.name, now.Sub(c.written), err)
		}
	}
	if left := check.Value(os.ReadDir(dir))(t); len(left) != 7 {
		t.Errorf("%v", left)
	}
	check.NoError(t, Expire(filepath.Join(dir, "none"), now, served))
}
