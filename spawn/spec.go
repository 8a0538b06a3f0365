package spawn

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// What a shim is to serve it finds in a file that was left for it in the state directory, where only root writes: the order. A
// shim that is ready takes it, by removing it, and who doesn't want to wait any longer takes it, too: so an order is either carried
// out or withdrawn, and never both. A shim that can't carry it out answers by another file, with one line: the refusal.

const (
	orderSuffix   = ".start"
	refusalSuffix = ".error"

	maxOrder   = 64 << 10 // bytes
	maxRefusal = 4 << 10  // bytes
)

// A Spec says what a shim is for. Either DomainDir and PIDFile or PID is set.
type Spec struct {
	UUID  string
	Name  string
	Clock string // the domain's clock element as XML; "" watches only
	// Policy is the file of the host's policy that Clock comes from; "" is the domain's own metadata.
	Policy string

	DomainDir string // a relay: the domain's directory, in which QEMU's socket has been renamed already
	PIDFile   string // a relay: the file that will hold QEMU's pid

	// Of a QEMU that loads a state, with a relay or a watch: control.Migrated or control.Restored, and the anchor that came with it, as XML.
	Incoming, Anchor string

	PID int // a watch: QEMU's pid

	Module string // path of libftclock-qemu.so; "" is the installed one
	Stops  string // directory of readings for restored guests, and of the records; "" is host.DataDir
}

// Sealed says how the module goes into QEMU. One of libvirt's on this host sees the installed file, and SELinux has it load no other.
// One that isn't libvirt's may live in a container: it is given the module in a sealed memory file.
func (o Spec) Sealed() bool { return !host.IsUUID(o.UUID) }

// CheckID says whether id can name a shim: a domain's UUID as libvirt writes it, or what stands for one where a QEMU isn't
// libvirt's, see host.ProcessUUID.
func CheckID(id string) error {
	if _, _, process := host.ProcessOf(id); !process && !host.IsUUID(id) {
		return fmt.Errorf("%.64q is no UUID", id)
	}
	return nil
}

// check says what is wrong with it. It comes from a file: nothing is taken for granted.
func (o Spec) check() error {
	path := func(p string) bool {
		return filepath.IsAbs(p) && filepath.Clean(p) == p && len(p) < unix.PathMax && !strings.ContainsRune(p, 0)
	}
	if err := CheckID(o.UUID); err != nil {
		return err
	}
	if o.Clock != "" {
		if _, err := metadata.ParseElement([]byte(o.Clock)); err != nil {
			return err
		}
	}
	switch {
	case o.Name == "" || len(o.Name) > 4096 || strings.ContainsAny(o.Name, "\x00\n"):
		return errors.New("the domain's name is empty, too long, or not one line")
	case (o.DomainDir == "") == (o.PID == 0):
		return errors.New("either the domain's directory or a pid is needed")
	case o.DomainDir != "" && (!path(o.DomainDir) || !path(o.PIDFile)):
		return errors.New("the domain's directory and QEMU's pid file are absolute paths")
	case o.DomainDir == "" && (o.PID <= 1 || o.PIDFile != ""):
		return fmt.Errorf("%d is no process of QEMU's", o.PID)
	case o.Policy != "" && !path(o.Policy):
		return errors.New("the file of the host's policy is an absolute path")
	case o.Module != "" && !path(o.Module) || o.Stops != "" && !path(o.Stops):
		return errors.New("the module and the directory of readings are absolute paths")
	case o.Incoming != "" && o.Incoming != control.Migrated && o.Incoming != control.Restored:
		return fmt.Errorf("a state is %s or %s", control.Migrated, control.Restored)
	}
	if o.Anchor != "" {
		if _, err := metadata.ParseAnchor([]byte(o.Anchor)); err != nil {
			return err
		}
	}
	return nil
}

func orderPath(dir, id string) string   { return filepath.Join(dir, id+orderSuffix) }
func refusalPath(dir, id string) string { return filepath.Join(dir, id+refusalSuffix) }

// Leave leaves an order in the state directory dir. An older one of the same name is overwritten.
func Leave(dir string, o Spec) error {
	text, err := o.Text()
	if err == nil {
		err = os.MkdirAll(dir, 0o711)
	}
	if err == nil {
		_ = os.Remove(refusalPath(dir, o.UUID))
		err = host.WriteFile(orderPath(dir, o.UUID), text)
	}
	if err != nil {
		return fmt.Errorf("ordering a shim for domain %s: %w", o.Name, err)
	}
	return nil
}

// Text is what Parse reads.
func (o Spec) Text() ([]byte, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	text, err := json.Marshal(o)
	if err == nil && len(text) > maxOrder {
		err = fmt.Errorf("it is longer than %d bytes", maxOrder)
	}
	return text, err
}

// Take takes an order away. Whoever has done so is alone in that; it is false if somebody else was, or nobody left one.
func Take(dir, id string) bool { return os.Remove(orderPath(dir, id)) == nil }

// Waiting says whether an order waits to be taken.
func Waiting(dir, id string) bool {
	_, err := os.Lstat(orderPath(dir, id))
	return err == nil
}

// Read reads the order that was left for id.
func Read(dir, id string) (o Spec, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("reading the order for shim %.64q: %w", id, err)
		}
	}()
	if err := CheckID(id); err != nil {
		return o, err
	}
	text, err := readOwn(orderPath(dir, id))
	if errors.Is(err, os.ErrNotExist) {
		return o, errors.New("there is none: shims are started by libvirt's hook, `ftclock enable --live` and `ftclock attach`")
	}
	if err != nil {
		return o, err
	}
	if o, err = Parse(text); err != nil {
		return Spec{}, err
	}
	if o.UUID != id {
		return Spec{}, fmt.Errorf("it is for %s", o.UUID)
	}
	return o, nil
}

// Parse reads a Spec from what Text gives.
func Parse(text []byte) (Spec, error) {
	var o Spec
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&o); err != nil {
		return Spec{}, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Spec{}, errors.New("something follows it")
	}
	return o, o.check()
}

// readOwn reads a file that nobody but this user can have written.
func readOwn(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("it isn't a file")
	case int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0:
		return nil, errors.New("others than root may use it: uid " + strconv.Itoa(int(st.Uid)) + ", mode " + strconv.FormatUint(uint64(st.Mode&0o777), 8))
	case st.Size > maxOrder:
		return nil, fmt.Errorf("it is longer than %d bytes", maxOrder)
	}
	return io.ReadAll(io.LimitReader(f, maxOrder))
}

// Refuse answers an order that can't be carried out, if somebody still waits for that.
func Refuse(dir, id string, reason error) {
	if CheckID(id) != nil || !Waiting(dir, id) {
		return
	}
	line := host.ErrorLine(reason)
	_ = host.WriteFile(refusalPath(dir, id), []byte(line[:min(len(line), maxRefusal)]))
}

// Refusal gives the answer to an order that wasn't carried out, and removes it; "" without one.
func Refusal(dir, id string) string {
	text, err := readOwn(refusalPath(dir, id))
	if err != nil {
		return ""
	}
	_ = os.Remove(refusalPath(dir, id))
	return string(text)
}
