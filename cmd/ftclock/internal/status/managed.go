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
	"ftclock/host"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// Known is what libvirt knows of a domain.
type Known struct {
	Name, UUID string
	ID         string // empty: it isn't running
	Defined    bool   // ftclock's metadata is in the definition, for the next start
	Running    bool   // ftclock's metadata is in the running domain
	why        string // what is wrong with it
	forgotten  *Entry // it was managed, and isn't any more
}

// Managed lists libvirt's managed domains by UUID. With them come those that were managed and run without the metadata now, those
// that have a shim, and those for which also is true.
func (at Dirs) Managed(h *hypervisor.Host, also func(Known) bool, warn func(string, ...any)) (map[string]Known, error) {
	if err := h.CheckLocal("status"); err != nil && !h.IsTest() {
		return nil, err
	}
	lost, err := at.Forgotten()
	if err != nil {
		warn("%s; domains whose definitions were rewritten aren't shown", ui.ErrorText(err))
	}
	known := make(map[string]Known)
	return known, h.Each(func(d *hypervisor.Domain) {
		f := Look(d)
		isIt := func(e Entry) bool { return strings.EqualFold(e.UUID, f.UUID) }
		if i := slices.IndexFunc(lost, isIt); i >= 0 && !f.Defined && !f.Running {
			f.forgotten = &lost[i]
		}
		if f.Defined || f.Running || f.forgotten != nil || also(f) || f.ID != "" && at.HasShim(f.UUID) {
			known[f.UUID] = f
		}
	})
}

// Look asks libvirt for a domain's metadata. A domain that vanishes meanwhile has none.
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

// Forgotten is the state of a domain that was managed before and runs without ftclock's metadata.
const Forgotten control.State = "forgotten"

// maxStatus bounds a status file of libvirt's, in bytes.
const maxStatus = 16 << 20

// Forgotten finds the running domains that were managed at an earlier start, don't have the metadata now, and weren't disabled: a
// management tool rewrote their definitions. It reads libvirt's files, as the exporter doesn't talk to libvirt. An error means that
// the disk of the records hangs.
func (at Dirs) Forgotten() (all []Entry, err error) {
	files, _ := filepath.Glob(filepath.Join(at.Libvirt, "*.xml"))
	for _, file := range files {
		name, uuid, managed, err := readDomainStatus(file)
		if err != nil || managed || !host.IsUUID(uuid) || at.HasShim(uuid) {
			continue
		}
		all = append(all, Entry{Mute: true, Status: control.Status{Name: name, UUID: uuid, State: Forgotten,
			Why: "it was managed, and its definition no longer has ftclock's metadata: did a management tool rewrite it? `ftclock enable --live " +
				ui.ShellWord(name) + "` corrects it again, `ftclock disable " + ui.ShellWord(name) + "` confirms that this is intended"}})
	}
	if len(all) == 0 {
		return nil, nil
	}
	return at.managedBefore(all)
}

// looking admits one reader of the records at a time. On a disk that hangs it blocks a thread, and an exporter is scraped for years.
var looking = make(chan struct{}, 1)

// managedBefore keeps the entries whose record says that they were managed.
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

// readDomainStatus reads a status file of libvirt's, a <domstatus> with a <domain> in it. It parses only those of domains that aren't
// managed, which are few.
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
