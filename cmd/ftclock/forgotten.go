package main

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

	"ftclock/control"
	"ftclock/disk"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// forgotten is the state of a domain that runs without our metadata, and that was managed before.
const forgotten control.State = "forgotten"

// statusDir is where libvirt's QEMU driver keeps the status of the domains that run, an XML file each (virDomainObjSave).
var statusDir = pidDir

// maxStatus bounds such a file, bytes.
const maxStatus = 16 << 20

// forgottenDomains finds the running domains that were managed at an earlier start, have nothing of ours now, and that nobody has
// disabled: a manager wrote their definitions anew. It asks libvirt's files, not libvirt: the exporter can't. The error says that
// the disk of the records hangs.
func forgottenDomains() (all []entry, err error) {
	files, _ := filepath.Glob(filepath.Join(statusDir, "*.xml"))
	for _, file := range files {
		name, uuid, managed, err := readDomainStatus(file)
		if err != nil || managed || !isUUID(uuid) || hasDir(uuid) {
			continue
		}
		all = append(all, entry{mute: true, Status: control.Status{Name: name, UUID: uuid, State: forgotten,
			Why: "it was managed, and its definition has nothing of ftclock any more: a manager wrote it anew? `ftclock enable --live " +
				shellWord(name) + "` serves it again, `ftclock disable " + shellWord(name) + "` says that it is meant"}})
	}
	if len(all) == 0 {
		return nil, nil
	}
	return managedBefore(all)
}

// looking has the one who looks into the records: on a disk that hangs he holds a thread, and an exporter is asked for years.
var looking = make(chan struct{}, 1)

// managedBefore leaves those of which a record says that they were managed.
func managedBefore(all []entry) ([]entry, error) {
	select {
	case looking <- struct{}{}:
	default:
		return nil, fmt.Errorf("%s doesn't answer yet: its disk hangs", records)
	}
	dir, left := records, make(chan []entry, 1)
	err := disk.InTime(context.Background(), dir, func() error {
		defer func() { <-looking }()
		left <- slices.DeleteFunc(all, func(e entry) bool { return !record.Managed(dir, e.UUID) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-left, nil
}

func isForgotten(uuid string) func(entry) bool {
	return func(e entry) bool { return strings.EqualFold(e.UUID, uuid) }
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

// checkForgotten is the doctor's look at them.
func checkForgotten() []finding {
	all, err := forgottenDomains()
	if err != nil {
		return []finding{{bad, "no records are kept: " + sayError(err), "see to the file system (df, mount); clocks are kept meanwhile"}}
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.Name, b.Name) })
	var findings []finding
	for _, e := range all {
		what, fix, _ := strings.Cut(e.Why, "? ")
		findings = append(findings, finding{bad, e.Name + " runs uncorrected: " + what, fix})
	}
	return findings
}
