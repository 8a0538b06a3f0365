package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// anchorCmd hands a guest's clock over to another host or process that continues the guest.
type anchorCmd struct {
	Show    anchorShowCmd    `cmd:"" help:"Show what a guest's clock reads, and how well that is known."`
	Export  anchorExportCmd  `cmd:"" help:"Print the same in the form that \"ftclock anchor import\" reads on another host."`
	Import  anchorImportCmd  `cmd:"" help:"Catch up the state that a QEMU loads next."`
	Publish anchorPublishCmd `cmd:"" help:"Write the anchors of running domains into their live metadata, which libvirt sends along with a migration."`
}

// exported is an anchor in the form that export prints and import reads.
type exported struct {
	Version int    `json:"ftclock_anchor"`
	Domain  string `json:"domain"`
	UUID    string `json:"uuid"`
	metadata.Anchor
}

// exportVersion is raised when older readers would misunderstand the new form.
const exportVersion = 1

// maxExport bounds what is read, in bytes.
const maxExport = 64 << 10

// servedDomain finds the shim of a domain, by its name or UUID, or by the pid of a QEMU that `ftclock attach` serves. libvirt
// isn't needed for it.
func servedDomain(at status.Dirs, name string) (control.Info, error) {
	infos, err := control.List(at.Shims)
	// Who starts a QEMU that isn't libvirt's names it, and may give it any domain's name or UUID.
	var found []control.Info
	for _, is := range []func(control.Info) bool{
		func(i control.Info) bool { return i.UUID == name },
		func(i control.Info) bool { return i.Name == name && host.IsUUID(i.UUID) },
		func(i control.Info) bool {
			pid, _, ok := host.ProcessOf(i.UUID)
			return ok && strconv.Itoa(pid) == name
		},
		func(i control.Info) bool { return i.Name == name },
	} {
		if found = slices.DeleteFunc(slices.Clone(infos), func(i control.Info) bool { return !is(i) }); len(found) > 0 {
			break
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return control.Info{}, ui.Hinted(fmt.Errorf("%d shims serve a domain %q", len(found), name), "give its UUID, or QEMU's pid")
	case err != nil:
		return control.Info{}, err
	}
	return control.Info{}, ui.Hinted(fmt.Errorf("no shim serves a domain %q", name), "`ftclock status` shows those that are served")
}

// askAnchor asks the shim of a domain for its anchor. A refusal by the shim is a *notNowError.
func askAnchor(at status.Dirs, uuid string) (metadata.Anchor, error) {
	answer, err := at.Ask(uuid, control.Request{Do: "anchor"})
	switch {
	case status.NoShim(err):
		return metadata.Anchor{}, err
	case err != nil:
		return metadata.Anchor{}, &notNowError{err}
	case answer.Anchor == nil:
		return metadata.Anchor{}, errors.New("its shim answers without one")
	}
	return *answer.Anchor, answer.Anchor.Check()
}

// servedAnchor finds a domain as servedDomain does, and asks its shim.
func servedAnchor(at status.Dirs, name string) (i control.Info, a metadata.Anchor, err error) {
	if i, err = servedDomain(at, name); err != nil {
		return i, a, err
	}
	if a, err = askAnchor(at, i.UUID); err != nil {
		err = fmt.Errorf("reading the anchor of %s: %w", i.Name, err)
	}
	return i, a, err
}

type anchorShowCmd struct {
	Domain string `arg:"" help:"Name or UUID, or the pid of a QEMU that libvirt didn't start."`
}

func (c *anchorShowCmd) Run(p *program) error {
	i, a, err := servedAnchor(p.dirs, c.Domain)
	if err != nil {
		return err
	}
	p.Printf("domain           %s (%s)\n", host.OneLine(i.Name), host.OneLine(i.UUID))
	p.Printf("guest's clock    %v\n", time.Duration(a.Clock))
	p.Printf("at               %s\n", time.Unix(0, int64(a.Real)).UTC().Format("2006-01-02 15:04:05.000000000 UTC"))
	p.Printf("known to         %v\n", time.Duration(a.Error))
	p.Printf("host's rate      %.3f ppm\n", float64(a.Rate)/1000)
	if a.Synchronised {
		p.Printf("host's clock     synchronised, to %v\n", time.Duration(a.HostError))
	} else {
		p.Printf("host's clock     not synchronised\n")
	}
	return nil
}

type anchorExportCmd struct {
	Domain string `arg:"" help:"Name or UUID, or the pid of a QEMU that libvirt didn't start."`
}

func (anchorExportCmd) Help() string {
	return "ftclock anchor export DOMAIN | ssh BACKUP ftclock anchor import DOMAIN"
}

func (c *anchorExportCmd) Run(p *program) error {
	i, a, err := servedAnchor(p.dirs, c.Domain)
	if err != nil {
		return err
	}
	text, err := json.Marshal(exported{exportVersion, i.Name, i.UUID, a})
	if err != nil {
		return err
	}
	p.Printf("%s\n", text)
	return nil
}

type anchorImportCmd struct {
	Domain string `arg:"" help:"Name or UUID, or the pid of a QEMU that libvirt didn't start."`
	File   string `arg:"" optional:"" default:"-" help:"What \"ftclock anchor export\" printed; - is the standard input."`
}

func (anchorImportCmd) Help() string {
	return "The next state that this QEMU loads is then caught up by the domain's rule for a migration. An anchor is used once; " +
		"importing another replaces it."
}

func (c *anchorImportCmd) Run(p *program) error {
	i, err := servedDomain(p.dirs, c.Domain)
	if err != nil {
		return err
	}
	in := p.stdin
	name := "the standard input"
	if c.File != "-" {
		f, err := os.Open(c.File)
		if err != nil {
			return err
		}
		defer f.Close()
		in, name = f, c.File
	}
	a, err := readExport(in)
	if err != nil {
		return ui.Hinted(fmt.Errorf("reading an anchor from %s: %w", name, err), "`ftclock anchor export DOMAIN` prints one")
	}
	if _, err := p.dirs.Ask(i.UUID, control.Request{Do: "import", Anchor: &a.Anchor}); err != nil {
		return fmt.Errorf("giving %s the anchor of %s: %w", i.Name, a.Domain, err)
	}
	p.Printf("%s: the next state that it loads goes on from what the clock of %s read at %s\n", host.OneLine(i.Name), host.OneLine(a.Domain),
		time.Unix(0, int64(a.Real)).UTC().Format("2006-01-02 15:04:05.000000 UTC"))
	return nil
}

func readExport(in io.Reader) (exported, error) {
	var a exported
	text, err := io.ReadAll(io.LimitReader(in, maxExport+1))
	if err != nil {
		return a, err
	}
	if len(text) > maxExport {
		return a, fmt.Errorf("it is longer than %d bytes", maxExport)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&a); err != nil {
		return a, errors.New("it isn't one")
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return a, errors.New("there is more than one")
	}
	if a.Version != exportVersion {
		return a, fmt.Errorf("it has version %d, and this program knows %d", a.Version, exportVersion)
	}
	return a, a.Check()
}

type anchorPublishCmd struct {
	Domains []string `arg:"" optional:"" name:"domain" help:"Names, UUIDs or ids. Default: all running domains that are served."`
}

func (anchorPublishCmd) Help() string {
	return "A migrated domain or a restored image continues from the last anchor that was published. ftclock-anchor.timer publishes them every minute."
}

func (c *anchorPublishCmd) Run(p *program) error {
	names := c.Domains
	if len(names) == 0 {
		infos, err := control.List(p.dirs.Shims)
		if err != nil {
			p.Warn("%v; %s", err, status.NoState)
		}
		for _, i := range infos {
			if host.IsUUID(i.UUID) { // libvirt doesn't know the others
				names = append(names, i.UUID)
			}
		}
		if len(names) == 0 {
			return nil // don't start a socket-activated libvirtd each minute for nothing
		}
	}
	h, err := hypervisor.Connect(p.uri())
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.CheckLocal("publishing an anchor"); err != nil {
		return err
	}
	bad := false
	for _, err := range sideBySide(names, func(name string) error { return publish(p.dirs, h, name) }) {
		if err != nil {
			// Before its first pause a domain has nothing to publish. That is an error only if the domain was named.
			var later *notNowError
			if len(c.Domains) == 0 && errors.As(err, &later) {
				continue
			}
			p.Tell("warning", err)
			bad = true
		}
	}
	if bad {
		return ui.ErrProblem
	}
	return nil
}

// sideBySide calls f for each name, four at a time, and returns their errors in order. So a domain that blocks libvirt, for up to
// 30 s, doesn't delay the others. libvirtd takes five requests of a client at a time (max_client_requests in libvirtd.conf).
func sideBySide(names []string, f func(name string) error) []error {
	all := make([]error, len(names))
	var group errgroup.Group
	group.SetLimit(4)
	for i, name := range names {
		group.Go(func() error {
			all[i] = f(name)
			return nil
		})
	}
	_ = group.Wait()
	return all
}

// notNowError: a domain has no anchor now, and may have one later.
type notNowError struct{ error }

func (e *notNowError) Unwrap() error { return e.error }

// publish writes the anchor of one domain into its live metadata.
func publish(at status.Dirs, h *hypervisor.Host, name string) error {
	d, err := h.Find(name)
	if err != nil {
		return err
	}
	defer d.Close()
	state, err := d.State()
	if err != nil {
		return err
	}
	if state != libvirt.DOMAIN_RUNNING {
		published(at, d.UUID) // what was published before is good until it runs again
		return &notNowError{fmt.Errorf("publishing the anchor of %s: it isn't running", d.Name)}
	}
	// During a long job, such as a migration or a live snapshot, writing metadata blocks for 30 s and then fails.
	if job, err := d.GetJobInfo(); err == nil && job.Type != libvirt.DOMAIN_JOB_NONE {
		return &notNowError{fmt.Errorf("publishing the anchor of %s: a job of libvirt's is on (`virsh domjobinfo %s`), and it has to end first", d.Name, d.Name)}
	}
	a, err := askAnchor(at, d.UUID)
	if err == nil {
		err = d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, a.XML(), metadata.AnchorPrefix, metadata.AnchorNamespace,
			libvirt.DOMAIN_AFFECT_LIVE)
	}
	if err != nil {
		return fmt.Errorf("publishing the anchor of %s: %w", d.Name, err)
	}
	published(at, d.UUID)
	return nil
}

// published tells the shim, for the exporter. Older shims don't know the request.
func published(at status.Dirs, uuid string) { _, _ = at.Ask(uuid, control.Request{Do: "published"}) }
