package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"ftclock/host"
	metadata "ftclock/xml-templates"
)

/*
A running domain's metadata may be changed by anybody who manages it (virsh metadata --live), and no one tells the shim:
libvirt has an event for that, but the shim isn't libvirt's client, and no hook is called. What libvirt does is to write
what it knows of the domain into a file of its own, each time that it changes. So the shim looks into that file when
the guest is stopped, beside the relay and not in its way. Only a change counts: what `ftclock enable --live` said stays
said until the metadata says something else.
*/

// maxStatusXML bounds what is read of libvirt's file, in bytes.
const maxStatusXML = 16 << 20

// statusXML is the file into which libvirt writes a running domain's state (libvirt's src/conf/domain_conf.c,
// virDomainConfigFile: unlike the pid file's, its name has the domain's as it is).
func (s *shim) statusXML() string {
	run := host.LibvirtRun
	if s.PIDFile != "" {
		run = filepath.Dir(s.PIDFile)
	}
	return filepath.Join(run, filepath.Base(s.Name)+".xml")
}

// liveMetadata is what the last look into libvirt's file found, so that one that finds the same costs little.
type liveMetadata struct {
	mu   sync.Mutex // held during a look
	file []byte
	stat unix.Stat_t // of the file that was read last
	seen []byte      // the metadata element, as it was written
	err  error       // what was wrong with that file
}

// read reads the policy of libvirt's running domain with that UUID: nil for none. changed is false where the metadata is
// what it was at the last call.
func (l *liveMetadata) read(path, uuid string) (policy *metadata.Policy, changed bool, err error) {
	before := l.stat
	if l.stat, err = statQuietly(path); err != nil {
		return nil, false, err
	}
	if (l.seen != nil || l.err != nil) && sameFile(&before, &l.stat) {
		return nil, false, l.err
	}
	defer func() { l.err = err }()
	if l.file, err = readQuietly(l.file[:0], path, maxStatusXML); err != nil {
		l.stat = unix.Stat_t{}
		return nil, false, err
	}
	text := l.file
	element := cut(text, "<metadata>", "</metadata>")
	if l.seen != nil && bytes.Equal(element, l.seen) {
		return nil, false, nil
	}
	domain := cut(text, "<domain ", "</domain>")
	if domain == nil {
		return nil, false, errors.New("libvirt's state holds no domain")
	}
	d, err := metadata.Parse(domain)
	switch {
	case err != nil:
		return nil, false, err
	case d.UUID != uuid:
		return nil, false, errors.New("libvirt's state is of another domain")
	}
	l.seen = append(make([]byte, 0, len(element)), element...) // not nil, even of none
	return d.Policy, true, nil
}

// These are calls that Go's scheduler isn't told of. One that it is told of would wake up the runtime's monitor thread at each stop, and
// that would take the processor, again and again, from a relay with messages to move. So they must not wait: what they ask for is in
// memory, as /run is where systemd made it.

func statQuietly(path string) (st unix.Stat_t, err error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return st, err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_STAT, uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&st)), 0); errno != 0 {
		return st, &os.PathError{Op: "stat", Path: path, Err: errno}
	}
	return st, nil
}

// sameFile tells that a file wasn't changed: libvirt writes a new one and renames it.
func sameFile(a, b *unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.Size == b.Size && a.Mtim == b.Mtim && a.Ctim == b.Ctim
}

// readQuietly appends what is in a file to into, most bytes of it at most. A file that may be on a disk is read the usual way.
func readQuietly(into []byte, path string, most int) ([]byte, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return into, err
	}
	fd, _, errno := unix.RawSyscall(unix.SYS_OPEN, uintptr(unsafe.Pointer(name)), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errno != 0 {
		return into, &os.PathError{Op: "open", Path: path, Err: errno}
	}
	defer func() { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }()
	var fs unix.Statfs_t
	if _, _, errno := unix.RawSyscall(unix.SYS_FSTATFS, fd, uintptr(unsafe.Pointer(&fs)), 0); errno != 0 {
		return into, &os.PathError{Op: "statfs", Path: path, Err: errno}
	}
	read := unix.Read
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		read = func(fd int, b []byte) (int, error) {
			n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
			if errno != 0 {
				return 0, errno
			}
			return int(n), nil
		}
	}
	for {
		into = slices.Grow(into, 4096)
		n, err := read(int(fd), into[len(into):cap(into)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return into, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return into, nil
		default:
			into = into[:len(into)+n]
		}
		if len(into) > most {
			return into, fmt.Errorf("%s has more than %d bytes", path, most)
		}
	}
}

// cut is the first text that begins with from and ends with the last to; nil if there is none.
func cut(text []byte, from, to string) []byte {
	i, j := bytes.Index(text, []byte(from)), bytes.LastIndex(text, []byte(to))
	if i < 0 || j < i {
		return nil
	}
	return text[i : j+len(to)]
}

// lookAtMetadata takes over a policy that was changed in the running domain's metadata, beside the caller or not. One look at a time,
// whatever QEMU and the command line ask for: what changes meanwhile is seen at the next.
func (s *shim) lookAtMetadata(beside bool) {
	if !s.live.mu.TryLock() {
		return
	}
	if beside {
		go s.lookNow()
	} else {
		s.lookNow()
	}
}

// lookNow is a look. It ends the lock that was begun for it.
func (s *shim) lookNow() {
	defer s.live.mu.Unlock()
	policy, changed, err := s.live.read(s.statusXML(), s.UUID)
	if errors.Is(err, os.ErrNotExist) {
		return // not libvirt's, or gone
	}
	if err != nil {
		s.domain.notes.warn("the policy stays as it is: reading the running domain's metadata: " + err.Error() + "; write it anew with virsh metadata --live, or `ftclock enable --live`")
	}
	clock := clockXML(policy)
	if changed && clock != s.domain.notes.read().Metadata { // which is changed nowhere else
		s.domain.notes.change(func(m *memory) { m.Metadata = clock })
		s.domain.setPolicy(policy)
	}
}
