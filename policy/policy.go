package policy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	metadata "ftclock/xml-templates"
)

// Dir has the files of the host's policy, NAME.xml. Their names say in which order they count.
const Dir = "/etc/ftclock/policy.d"

// A domain's start waits for all of them to be read, so that they are few and small.
const (
	// MaxFiles is how many files there may be. More than those, and none is used.
	MaxFiles = 32
	maxSize  = 64 << 10 // bytes
)

// A File is one of them.
type File struct {
	Path string
	metadata.HostPolicy
	// Err says in one line what is wrong with it. The domains that it names are known as far as it could be read.
	Err error
}

// Read reads the files of a directory in the order of their names. A directory that isn't there has none. The error is the
// directory's; what is wrong with a file is in its Err.
func Read(dir string) ([]File, error) {
	d, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the host's policy: %w", err)
	}
	defer d.Close()
	if err := trusted(d); err != nil {
		return nil, fmt.Errorf("reading the host's policy: %w", err)
	}
	// What else lies there, as editors leave it, counts as well: the time to read a directory is bounded, too.
	names, err := d.Readdirnames(2*MaxFiles + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the host's policy: %w", err)
	}
	more := len(names) > 2*MaxFiles
	names = slices.DeleteFunc(names, func(name string) bool { return !strings.HasSuffix(name, ".xml") || strings.HasPrefix(name, ".") })
	if more || len(names) > MaxFiles {
		return nil, fmt.Errorf("reading the host's policy: %s has more than %d files, so that none is used: one file can name many domains", dir, MaxFiles)
	}
	slices.Sort(names)
	var files []File
	for _, name := range names {
		f := File{Path: filepath.Join(dir, name)}
		f.HostPolicy, f.Err = readFile(f.Path)
		files = append(files, f)
	}
	return files, nil
}

func readFile(path string) (p metadata.HostPolicy, err error) {
	// A pipe has no writer to wait for.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return p, err
	}
	defer f.Close()
	if err := trusted(f); err != nil {
		return p, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err == nil && len(text) > maxSize {
		err = fmt.Errorf("it is longer than %d bytes", maxSize)
	}
	if err == nil {
		p, err = metadata.ParseHostPolicy(text)
	}
	if err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// trusted checks that nobody but root, or who runs this, can have written it.
func trusted(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no file: remove it", f.Name())
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, so that it isn't used: chown root %s", f.Name(), st.Uid, f.Name())
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s can be written by others than its owner, so that it isn't used: chmod go-w %s", f.Name(), f.Name())
	}
	return nil
}

// Naming gives those of the files that name a domain, in their order: the first one counts. Their selectors are those that do.
func Naming(files []File, d *metadata.Subject) (all []File) {
	for _, f := range files {
		f.For = slices.DeleteFunc(slices.Clone(f.For), func(s metadata.Selector) bool { return !s.Matches(d) })
		if len(f.For) > 0 {
			all = append(all, f)
		}
	}
	return all
}
