package status

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/disk"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// Known is what libvirt knows of a domain.
type Known struct {
	Name, UUID string
	ID         string // empty: it isn't running
	Defined    bool   // our metadata is in the definition of the next start
	Running    bool   // our metadata is in what runs
	why        string // what is wrong with it
	forgotten  *Entry // it was managed, and isn't any more
}

// Unreachable is libvirt's own error at connecting.
type Unreachable struct{ Err error }

func (u *Unreachable) Error() string { return u.Err.Error() }

func (u *Unreachable) Unwrap() error { return u.Err }

// Managed is managed for those who say themselves what it means that libvirt is unreachable.
func (at Dirs) Managed(uri string, also func(Known) bool, warn func(string, ...any)) (map[string]Known, error) {
	h, err := hypervisor.Connect(uri)
	if err != nil {
		var lv libvirt.Error
		if errors.As(err, &lv) {
			return nil, &Unreachable{err}
		}
		return nil, err
	}
	defer h.Close()
	if err := h.CheckLocal("status"); err != nil && !h.IsTest() {
		return nil, err
	}
	all, err := h.ListAllDomains(0)
	if err != nil {
		return nil, fmt.Errorf("listing domains: %w", err)
	}
	known := make(map[string]Known)
	lost, err := at.Forgotten()
	if err != nil {
		warn("%s; domains whose definitions were written anew aren't shown", ui.ErrorText(err))
	}
	for i := range all {
		d, err := h.Describe(&all[i])
		if errors.Is(err, libvirt.ERR_NO_DOMAIN) {
			continue // it went in the meantime
		}
		if err != nil {
			return nil, err
		}
		f := Look(d)
		if i := slices.IndexFunc(lost, isForgotten(f.UUID)); i >= 0 && !f.Defined && !f.Running {
			f.forgotten = &lost[i]
		}
		if f.Defined || f.Running || f.forgotten != nil || also(f) || f.ID != "" && at.HasShim(f.UUID) {
			known[f.UUID] = f
		}
		d.Close()
	}
	return known, nil
}

// Look asks for our metadata. A domain that vanishes meanwhile has none.
func Look(d *hypervisor.Domain) Known {
	f := Known{Name: d.Name, UUID: d.UUID}
	if d.Active {
		if id, err := d.GetID(); err == nil {
			f.ID = fmt.Sprint(id)
		}
		element, err := d.Element(libvirt.DOMAIN_AFFECT_LIVE)
		f.Running = err == nil && element != ""
	}
	if d.Persistent {
		element, err := d.Element(libvirt.DOMAIN_AFFECT_CONFIG)
		f.Defined = err == nil && element != ""
		if _, err := metadata.ParseElement([]byte(element)); f.Defined && err != nil {
			f.why = "it won't start: " + ui.ErrorText(err)
		}
	}
	return f
}

// Forgotten is the state of a domain that runs without our metadata, and that was managed before.
const Forgotten control.State = "forgotten"

// maxStatus bounds such a file, bytes.
const maxStatus = 16 << 20

// Forgotten finds the running domains that were managed at an earlier start, have nothing of ours now, and that nobody has
// disabled: a manager wrote their definitions anew. It asks libvirt's files, not libvirt: the exporter can't. The error says that
// the disk of the records hangs.
func (at Dirs) Forgotten() (all []Entry, err error) {
	files, _ := filepath.Glob(filepath.Join(at.Libvirt, "*.xml"))
	for _, file := range files {
		name, uuid, managed, err := readDomainStatus(file)
		if err != nil || managed || !hypervisor.IsUUID(uuid) || at.HasShim(uuid) {
			continue
		}
		all = append(all, Entry{Mute: true, Status: control.Status{Name: name, UUID: uuid, State: Forgotten,
			Why: "it was managed, and its definition has nothing of ftclock any more: a manager wrote it anew? `ftclock enable --live " +
				ui.ShellWord(name) + "` serves it again, `ftclock disable " + ui.ShellWord(name) + "` says that it is meant"}})
	}
	if len(all) == 0 {
		return nil, nil
	}
	return at.managedBefore(all)
}

// looking has the one who looks into the records: on a disk that hangs he holds a thread, and an exporter is asked for years.
var looking = make(chan struct{}, 1)

// managedBefore leaves those of which a record says that they were managed.
func (at Dirs) managedBefore(all []Entry) ([]Entry, error) {
	select {
	case looking <- struct{}{}:
	default:
		return nil, fmt.Errorf("%s doesn't answer yet: its disk hangs", at.Records)
	}
	dir, left := at.Records, make(chan []Entry, 1)
	err := disk.InTime(context.Background(), dir, func() error {
		defer func() { <-looking }()
		left <- slices.DeleteFunc(all, func(e Entry) bool { return !record.Managed(dir, e.UUID) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-left, nil
}

func isForgotten(uuid string) func(Entry) bool {
	return func(e Entry) bool { return strings.EqualFold(e.UUID, uuid) }
}

// readDomainStatus reads a status file of libvirt's: <domstatus> with a <domain> in it. A managed domain's isn't parsed, as most are.
func readDomainStatus(file string) (name, uuid string, managed bool, err error) {
	f, err := os.Open(file)
	if err != nil {
		return "", "", false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxStatus+1))
	if err == nil && len(text) > maxStatus {
		err = errors.New("it is too long")
	}
	if err != nil || metadata.Managed(text) {
		return "", "", err == nil, err
	}
	var status struct {
		XMLName xml.Name `xml:"domstatus"`
		Domain  struct {
			Name string `xml:"name"`
			UUID string `xml:"uuid"`
		} `xml:"domain"`
	}
	if err := xml.Unmarshal(text, &status); err != nil {
		return "", "", false, err
	}
	return status.Domain.Name, status.Domain.UUID, false, nil
}
