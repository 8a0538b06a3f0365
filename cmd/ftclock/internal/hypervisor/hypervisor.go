package hypervisor

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"

	"libvirt.org/go/libvirt"

	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

const defaultURI = "qemu:///system"

// Host is a connection to libvirt.
type Host struct {
	*libvirt.Connect
	URI    string // as libvirt has it, never empty
	driver string // "QEMU", or "Test" for libvirt's mock
}

// Connect opens the connection that the operator wants; "" is libvirt's default, or else qemu:///system. libvirt prints no errors of its
// own: its binding for Go installs a handler that is silent.
func Connect(uri string) (*Host, error) {
	if uri == "" && os.Getenv("LIBVIRT_DEFAULT_URI") == "" {
		uri = defaultURI
	}
	shown := uri
	if shown == "" {
		shown = os.Getenv("LIBVIRT_DEFAULT_URI")
	}
	if err := CheckURI(shown); err != nil {
		return nil, err
	}
	conn, err := libvirt.NewConnectWithAuthDefault(uri, 0)
	if err != nil {
		return nil, explainConnect(shown, err)
	}
	h := &Host{Connect: conn}
	if h.URI, err = conn.GetURI(); err == nil {
		h.driver, err = conn.GetType()
	}
	if err == nil {
		err = CheckURI(h.URI) // an alias of libvirt.conf may have hidden it
	}
	if err == nil && h.driver != "QEMU" && !h.IsTest() {
		err = ui.Hinted(fmt.Errorf("%s is libvirt's driver %s: ftclock serves QEMU with KVM", shown, h.driver),
			"-c "+defaultURI+" is this host's QEMU")
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Close ends the connection.
func (h *Host) Close() { _, _ = h.Connect.Close() }

// IsTest tells whether this is libvirt's mock, which runs no domain.
func (h *Host) IsTest() bool { return strings.EqualFold(h.driver, "test") }

// CheckURI refuses QEMU's libvirt drivers that ftclock doesn't serve.
func CheckURI(uri string) error {
	u, err := url.Parse(uri)
	if err != nil {
		return nil // an alias, or libvirt's to refuse
	}
	if driver, _, _ := strings.Cut(u.Scheme, "+"); driver != "qemu" || u.Path == "/system" || u.Path == "" {
		return nil
	}
	reason := "its QEMUs and their directories are a user's"
	if u.Path != "/session" {
		reason = "there is no hook in it"
	}
	return ui.Hinted(fmt.Errorf("%s is not supported: %s, and ftclock serves the system's", uri, reason),
		"use -c "+defaultURI+", and move the domain there if it is a user's")
}

// Local tells whether this is the host's own QEMU driver.
func (h *Host) Local() bool { return isLocal(h.URI) }

// CheckLocal refuses what isn't this host's QEMU driver; what names the action that needs it.
func (h *Host) CheckLocal(what string) error {
	if h.Local() {
		return nil
	}
	if h.IsTest() {
		return ui.Hinted(fmt.Errorf("%s needs a running QEMU, and %s is libvirt's mock", what, h.URI),
			"-c "+defaultURI+" is this host's QEMU")
	}
	return ui.Hinted(fmt.Errorf("%s works on the host that the domain runs on, and %s is another host", what, h.URI),
		"log in to that host and use -c "+defaultURI)
}

// isLocal tells whether a URI is this host's QEMU driver.
func isLocal(uri string) bool {
	u, err := url.Parse(uri)
	return err == nil && (u.Scheme == "qemu" || u.Scheme == "qemu+unix") && u.Host == "" && u.Path == "/system"
}

func explainConnect(uri string, err error) error {
	wrapped := fmt.Errorf("connecting to %s: %w", uri, err)
	var lv libvirt.Error
	errors.As(err, &lv)
	switch {
	case lv.Code == libvirt.ERR_AUTH_FAILED, lv.Code == libvirt.ERR_AUTH_CANCELLED, lv.Code == libvirt.ERR_AUTH_UNAVAILABLE,
		strings.Contains(lv.Message, "Permission denied"):
		return ui.Hinted(wrapped, "run it as root")
	case isLocal(uri):
		return ui.Hinted(wrapped, "libvirt's daemon seems not to run: `systemctl start libvirtd` (or virtqemud.socket)")
	}
	return ui.Hinted(wrapped, "`virsh -c "+uri+" uri` tries the same")
}

// Domain is a domain with its host, names and what libvirt has of it: a running one, a definition, or both.
type Domain struct {
	*libvirt.Domain
	Host               *Host
	opened             bool // the connection is its own
	Name, UUID         string
	Active, Persistent bool
}

// Open connects to the hypervisor and finds a domain there, as Find does. Close ends both.
func Open(uri, name string) (*Domain, error) {
	h, err := Connect(uri)
	if err != nil {
		return nil, err
	}
	d, err := h.Find(name)
	if err != nil {
		h.Close()
		return nil, err
	}
	d.opened = true
	return d, nil
}

// OpenRunning is Open for a domain that must be running.
func OpenRunning(uri, name string) (*Domain, error) {
	d, err := Open(uri, name)
	if err != nil {
		return nil, err
	}
	switch state, err := d.State(); {
	case err != nil:
		d.Close()
		return nil, err
	case state != libvirt.DOMAIN_RUNNING && state != libvirt.DOMAIN_BLOCKED:
		err = ui.Hinted(fmt.Errorf("%s isn't running", d.Name), fmt.Sprintf("`virsh start %s`, or `virsh resume %[1]s` if it is paused", ui.ShellWord(d.Name)))
		d.Close()
		return nil, err
	}
	return d, nil
}

// Close frees the domain, and ends the connection if Open made it.
func (d *Domain) Close() {
	_ = d.Free()
	if d.opened {
		d.Host.Close()
	}
}

// State asks whether the domain runs.
func (d *Domain) State() (libvirt.DomainState, error) {
	state, _, err := d.GetState()
	if err != nil {
		return state, fmt.Errorf("asking for the state of %s: %w", d.Name, err)
	}
	return state, nil
}

// Find looks a domain up like virsh: by id, by UUID, by name.
func (h *Host) Find(name string) (*Domain, error) {
	var found *libvirt.Domain
	var err error
	if id, notID := strconv.ParseUint(name, 10, 31); notID == nil {
		found, _ = h.LookupDomainById(uint32(id))
	}
	if uuid, ok := host.UUID(name); found == nil && ok {
		found, _ = h.LookupDomainByUUIDString(uuid)
	}
	if found == nil {
		found, err = h.LookupDomainByName(name)
	}
	if err != nil {
		if errors.Is(err, libvirt.ERR_NO_DOMAIN) {
			return nil, NoDomain(name)
		}
		return nil, fmt.Errorf("looking up domain %q: %w", name, err)
	}
	return h.Describe(found)
}

// NoDomain is the error for a name that no domain has.
func NoDomain(name string) error {
	return ui.Hinted(fmt.Errorf("no domain %q", name), "`virsh list --all` shows the domains")
}

// Describe makes a Domain of libvirt's, or frees that in case of an error.
func (h *Host) Describe(found *libvirt.Domain) (*Domain, error) {
	d := &Domain{Domain: found, Host: h}
	var err error
	if d.Name, err = found.GetName(); err == nil {
		d.UUID, err = found.GetUUIDString()
	}
	if err == nil {
		d.Active, err = found.IsActive()
	}
	if err == nil {
		d.Persistent, err = found.IsPersistent()
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("asking about a domain: %w", err)
	}
	return d, nil
}

// Each calls f with each domain, running or not, for as long as the call lasts. One that vanishes meanwhile is left out.
func (h *Host) Each(f func(*Domain)) error {
	all, err := h.ListAllDomains(0)
	if err != nil {
		return fmt.Errorf("listing domains: %w", err)
	}
	for i := range all {
		switch d, failed := h.Describe(&all[i]); {
		case failed == nil:
			f(d)
			d.Close()
		case !errors.Is(failed, libvirt.ERR_NO_DOMAIN):
			err = failed
		}
	}
	return err
}

// Definition reads the XML that the next start uses.
func (d *Domain) Definition(flags libvirt.DomainXMLFlags) ([]byte, error) {
	return d.XML(libvirt.DOMAIN_XML_INACTIVE | flags)
}

// XML reads one of the definitions of a domain, as flags say.
func (d *Domain) XML(flags libvirt.DomainXMLFlags) ([]byte, error) {
	xml, err := d.GetXMLDesc(flags)
	if err != nil {
		return nil, fmt.Errorf("reading the definition of %s: %w", d.Name, err)
	}
	return []byte(xml), nil
}

// Element reads the clock element where impact says; empty: there is none.
func (d *Domain) Element(impact libvirt.DomainModificationImpact) (string, error) {
	text, err := d.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, metadata.Namespace, impact)
	if errors.Is(err, libvirt.ERR_NO_DOMAIN_METADATA) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading the metadata of %s: %w", d.Name, err)
	}
	return text, nil
}

// SetElement puts the policy's clock element where impact says, or removes it (nil).
func (d *Domain) SetElement(policy *metadata.Policy, impact libvirt.DomainModificationImpact) error {
	text := ""
	if policy != nil {
		text = bare(policy.XML())
	}
	err := d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, text, metadata.Prefix, metadata.Namespace, impact)
	if err != nil {
		return fmt.Errorf("writing the metadata of %s: %w", d.Name, err)
	}
	return nil
}

// bare removes prefix and namespace from a clock element: virDomainSetMetadata adds them, and refuses an element that declares the
// prefix already.
func bare(element string) string {
	return strings.NewReplacer(
		" xmlns:"+metadata.Prefix+`="`+metadata.Namespace+`"`, "",
		metadata.Prefix+":", "",
	).Replace(element)
}

// Parse reads one of a domain's definitions, and of ftclock's metadata in it.
func (d *Domain) Parse(flags libvirt.DomainXMLFlags) (metadata.Domain, error) {
	xml, err := d.XML(flags)
	if err != nil {
		return metadata.Domain{}, err
	}
	m, err := metadata.Parse(xml)
	if err != nil {
		return m, ui.Hinted(fmt.Errorf("reading the definition of %s: %w", d.Name, err), fmt.Sprintf(
			"fix it with `virsh edit %s`, or take it out with `ftclock disable %[1]s`", ui.ShellWord(d.Name)))
	}
	return m, nil
}

// Redefine hands an edited definition to libvirt, if it was changed at all.
func (d *Domain) Redefine(old, edited []byte) (changed bool, err error) {
	if bytes.Equal(old, edited) {
		return false, nil
	}
	defined, err := d.Host.DomainDefineXML(string(edited))
	if err != nil {
		return false, fmt.Errorf("defining %s: %w", d.Name, err)
	}
	_ = defined.Free()
	return true, nil
}

// ResumeAnew resumes the domain by a new connection, in case that of d is lost. It does nothing if the domain isn't paused.
func (d *Domain) ResumeAnew() error {
	again, err := Open(d.Host.URI, d.UUID)
	if err != nil {
		return err
	}
	defer again.Close()
	if state, _, err := again.GetState(); err == nil && state != libvirt.DOMAIN_PAUSED {
		return nil
	}
	return again.Resume()
}

// DomainNames are all domains of the hypervisor that a command without --connect would reach; none where it can't be reached.
func DomainNames() (names []string) {
	if h, err := Connect(""); err == nil {
		defer h.Close()
		_ = h.Each(func(d *Domain) { names = append(names, d.Name) })
	}
	return names
}

// Dotted words a version of libvirt's form, 1,000,000 * major + 1,000 * minor + release.
func Dotted(v uint32) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1_000%1_000, v%1_000)
}
