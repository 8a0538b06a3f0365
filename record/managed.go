package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// managedFile is there where a domain was started by its metadata, until somebody disables it: whoever writes its definition anew
// without the metadata, as managers do, doesn't remove it.
const managedFile = "managed"

// SetManaged says that a domain is managed by its metadata, or isn't to be any more.
func SetManaged(dir, uuid string, managed bool) error {
	path := filepath.Join(Path(dir, uuid), managedFile)
	if !managed {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.MkdirAll(Path(dir, uuid), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o600)
}

// Managed tells whether a domain was managed when it started last.
func Managed(dir, uuid string) bool {
	_, err := os.Lstat(filepath.Join(Path(dir, uuid), managedFile))
	return err == nil
}
