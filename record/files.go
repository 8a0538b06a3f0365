package record

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

func (w *Writer) file(kind string, n int) string {
	return filepath.Join(w.path, segmentName(kind, n))
}

func segmentName(kind string, n int) string { return fmt.Sprintf("%s-%06d%s", kind, n, suffix) }

func (w *Writer) head(kind string) head {
	return head{Kind: kindHead, Format: formatName, Version: Version, Holds: kind, UUID: w.c.UUID}
}

// segments lists the numbers of the files of a kind, ascending.
func segments(path, kind string) (numbers []int, err error) {
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing the record: %w", err)
	}
	for _, e := range entries {
		middle, ok := strings.CutPrefix(e.Name(), kind+"-")
		if middle, found := strings.CutSuffix(middle, suffix); ok && found {
			if n, err := strconv.Atoi(middle); err == nil && n > 0 && e.Type().IsRegular() {
				numbers = append(numbers, n)
			}
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// append writes entries to the newest file of the kind, or to a new one, and tells whether that was done.
func (w *Writer) append(kind string, b []byte, sync bool) bool {
	err := w.tryAppend(kind, b, sync)
	w.tell(err)
	w.problem = err
	return err == nil
}

// makeDir makes the domain's directory. That of all records was made at the shim's start: if it is gone, ftclock was purged, and
// nothing may be left.
func (w *Writer) makeDir() error {
	if err := os.Mkdir(w.path, 0o700); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (w *Writer) tryAppend(kind string, b []byte, sync bool) error {
	if err := w.makeDir(); err != nil {
		return fmt.Errorf("keeping the record: %w", err)
	}
	numbers, err := segments(w.path, kind)
	if err != nil {
		return err
	}
	newest := 0
	if len(numbers) > 0 {
		newest = numbers[len(numbers)-1]
	}
	if newest > 0 {
		done, err := w.appendTo(w.file(kind, newest), b, sync)
		if done || err != nil {
			return err
		}
	}
	// A new file. One in which a new minute begins says again what is to be known.
	text := appendEntry(nil, w.head(kind))
	if kind == timeline && w.begun {
		text = appendEntry(text, w.begin(0, true))
		if w.stated {
			again := w.state
			again.Again = true
			text = appendEntry(text, again)
		}
	}
	name := w.file(kind, newest+1)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("keeping the record: %w", err)
	}
	_, err = f.Write(append(text, b...))
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(name)
		return fmt.Errorf("keeping the record: %w", err)
	}
	if sync {
		syncDir(w.path)
	}
	w.prune(kind, append(numbers, newest+1))
	return nil
}

// appendTo appends to a file. Not done and no error: it is full, or it isn't ours to write to.
func (w *Writer) appendTo(name string, b []byte, sync bool) (done bool, err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	if size+int64(len(b)) > w.c.segment {
		return false, nil
	}
	first := make([]byte, min(size, 512))
	if _, err := f.ReadAt(first, 0); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("reading the record: %w", err)
	}
	line, _, _ := strings.Cut(string(first), "\n")
	if v, err := version([]byte(line)); err != nil || v != Version {
		return false, nil // a newer version's, or damaged: left as it is, a new file goes on beside it
	}
	// What a write that was cut short left becomes a line of its own, which readers find damaged.
	last := []byte{'\n'}
	if _, err := f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
		b = append([]byte{'\n'}, b...)
	}
	if _, err := f.Write(b); err != nil {
		_ = f.Truncate(size) // half an entry is none
		return false, fmt.Errorf("keeping the record: %w", err)
	}
	if sync {
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			_ = f.Truncate(size)
			return false, fmt.Errorf("keeping the record: syncing %s: %w", name, err)
		}
	}
	return true, nil
}

// version reads a file's first entry.
func version(line []byte) (int, error) {
	var h head
	text, ok := parseLine(line)
	if !ok || json.Unmarshal(text, &h) != nil || h.Kind != kindHead || h.Format != formatName {
		return 0, errDamaged
	}
	return h.Version, nil
}

// prune removes the oldest files of a kind beyond its bound. Newer versions' files aren't counted, and stay.
func (w *Writer) prune(kind string, numbers []int) {
	bound := w.c.maxTimeline
	if kind == pauses {
		bound = 2 * w.c.segment
	}
	total := w.c.segment // what the newest may become
	for _, n := range slices.Backward(numbers[:len(numbers)-1]) {
		name := w.file(kind, n)
		info, err := os.Stat(name)
		if err != nil || newerVersion(name) {
			continue
		}
		if total += info.Size(); total > bound {
			_ = os.Remove(name)
		}
	}
}

func newerVersion(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	line, _, _ := bufio.NewReaderSize(f, 1024).ReadLine()
	v, err := version(line)
	return err == nil && v > Version
}

// replaceOpen puts another open minute in the place of the last one, unless that is a newer version's.
func (w *Writer) replaceOpen(b []byte) bool {
	name := filepath.Join(w.path, open+suffix)
	err := func() error {
		if err := w.makeDir(); err != nil {
			return err
		}
		if newerVersion(name) {
			if err := os.Rename(name, setAside(name)); err != nil {
				return err
			}
		}
		return host.WriteFile(name, b)
	}()
	if err != nil {
		err = fmt.Errorf("keeping the record: %w", err)
	}
	w.tell(err)
	w.problem = err
	return err == nil
}

// setAside is a name that is free, for a file that must not be lost.
func setAside(name string) string {
	for i := 1; ; i++ {
		aside := name + ".newer-" + strconv.Itoa(i)
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			return aside
		}
	}
}

func syncDir(path string) {
	if d, err := os.Open(path); err == nil {
		_ = d.Sync()
		_ = d.Close()
	}
}

// tell reports trouble, each kind of it once.
func (w *Writer) tell(err error) {
	if err == nil || w.c.Problem == nil || w.told[kindOf(err)] {
		return
	}
	w.told[kindOf(err)] = true
	w.c.Problem(err)
}

func kindOf(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return "other"
}
