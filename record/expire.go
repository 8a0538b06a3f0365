package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"ftclock/host"
)

// Kept is how long the record of a QEMU that libvirt didn't start stays when nothing more is written to it: no other QEMU gets its
// name, so that a host of many would fill its disk with them. A domain's record stays until it is removed by hand.
const Kept = 30 * 24 * time.Hour

// Expire removes the records below dir that are older than Kept, of QEMUs that libvirt didn't start (host.ProcessUUID), that have
// ended, and that served says have no shim: one may live where this process doesn't see it.
func Expire(dir string, now time.Time, served func(uuid string) bool) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		pid, started, process := host.ProcessOf(e.Name())
		if !process || !e.IsDir() || served(e.Name()) {
			continue
		}
		if stat, err := host.ReadStat(pid); err == nil && stat.Started == started {
			continue
		}
		path := filepath.Join(dir, e.Name())
		last, failed := lastWritten(path)
		if failed == nil && now.Sub(last) > Kept {
			failed = os.RemoveAll(path)
		}
		err = errors.Join(err, failed)
	}
	return err
}

// lastWritten is when something was last written in a directory.
func lastWritten(dir string) (last time.Time, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
		return err
	})
	return last, err
}
