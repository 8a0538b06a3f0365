package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"

	"libvirt.org/go/libvirt"

	machine "ftclock/host"
	metadata "ftclock/xml-templates"
)

const defaultURI = "qemu:///system"

// host is a connection to libvirt.
type host struct {
	*libvirt.Connect
	uri    string // as libvirt has it, never empty
	driver string // "QEMU", or "Test" for libvirt's mock
}

// connect opens the connection that the operator wants. Its own error handler is silent already: libvirt's binding
// for Go installs one that keeps libvirt from printing.
func connect(uri string) (*host, error) {
	if uri == "" && os.Getenv("LIBVIRT_DEFAULT_URI") == "" {
		uri = defaultURI
	}
	shown := uri
	if shown == "" {
		shown = os.Getenv("LIBVIRT_DEFAULT_URI")
	}
	if err := checkURI(shown); err != nil {
		return nil, err
	}
	conn, err := libvirt.NewConnectWithAuthDefault(uri, 0)
	if err != nil {
		return nil, explainConnect(shown, err)
	}
	h := &host{Connect: conn}
	if h.uri, err = conn.GetURI(); err == nil {
		h.driver, err = conn.GetType()
	}
	if err == nil {
		err = checkURI(h.uri) // an alias of libvirt.conf may have hidden it
	}
	if err == nil && h.driver != "QEMU" && !h.isTest() {
		err = hinted(fmt.Errorf("%s is libvirt's driver %s: ftclock serves QEMU with KVM", shown, h.driver),
			"-c "+defaultURI+" is this host's QEMU")
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *host) close() { _, _ = h.Close() }

// isTest tells libvirt's mock from a hypervisor: its domains are never run.
func (h *host) isTest() bool { return strings.EqualFold(h.driver, "test") }

// checkURI refuses QEMU's libvirt drivers that ftclock doesn't serve.
func checkURI(uri string) error {
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
	return hinted(fmt.Errorf("%s is not supported: %s, and ftclock serves the system's", uri, reason),
		"use -c "+defaultURI+", and move the domain there if it is a user's")
}

// checkLocal refuses what isn't this host's QEMU driver; what says for what it has to be.
func checkLocal(h *host, what string) error {
	if isLocal(h.uri) {
		return nil
	}
	if h.isTest() {
		return hinted(fmt.Errorf("%s needs a running QEMU, and %s is libvirt's mock", what, h.uri),
			"-c "+defaultURI+" is this host's QEMU")
	}
	return hinted(fmt.Errorf("%s works on the host that the domain runs on, and %s is another one's", what, h.uri),
		"log in on that host and use -c "+defaultURI)
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
		return hinted(wrapped, "run it as root")
	case isLocal(uri):
		return hinted(wrapped, "libvirt's daemon seems not to run: `systemctl start libvirtd` (or virtqemud.socket)")
	}
	return hinted(wrapped, "`virsh -c "+uri+" uri` tries the same")
}

// domain is a domain with what is always needed of it.
type domain struct {
	*libvirt.Domain
	name, uuid         string
	active, persistent bool
}

func (d *domain) free() { _ = d.Free() }

// find looks a domain up like virsh: by id, by UUID, by name.
func (h *host) find(name string) (*domain, error) {
	var found *libvirt.Domain
	var err error
	if id, notID := strconv.ParseUint(name, 10, 31); notID == nil {
		found, _ = h.LookupDomainById(uint32(id))
	}
	if found == nil && isUUID(name) {
		found, _ = h.LookupDomainByUUIDString(name)
	}
	if found == nil {
		found, err = h.LookupDomainByName(name)
	}
	if err != nil {
		if errors.Is(err, libvirt.ERR_NO_DOMAIN) {
			return nil, noDomain(name)
		}
		return nil, fmt.Errorf("looking up domain %q: %w", name, err)
	}
	return h.describe(found)
}

func noDomain(name string) error {
	return hinted(fmt.Errorf("no domain %q", name), "`virsh list --all` shows the domains")
}

// describe asks for the rest of a domain, and frees it when that can't be had.
func (h *host) describe(found *libvirt.Domain) (*domain, error) {
	d := &domain{Domain: found}
	var err error
	if d.name, err = found.GetName(); err == nil {
		d.uuid, err = found.GetUUIDString()
	}
	if err == nil {
		d.active, err = found.IsActive()
	}
	if err == nil {
		d.persistent, err = found.IsPersistent()
	}
	if err != nil {
		d.free()
		return nil, fmt.Errorf("asking about a domain: %w", err)
	}
	return d, nil
}

// definition reads the XML that the next start uses.
func (d *domain) definition(flags libvirt.DomainXMLFlags) ([]byte, error) {
	return d.xml(libvirt.DOMAIN_XML_INACTIVE | flags)
}

func (d *domain) xml(flags libvirt.DomainXMLFlags) ([]byte, error) {
	xml, err := d.GetXMLDesc(flags)
	if err != nil {
		return nil, fmt.Errorf("reading the definition of %s: %w", d.name, err)
	}
	return []byte(xml), nil
}

// element reads the clock element where impact says; empty: there is none.
func (d *domain) element(impact libvirt.DomainModificationImpact) (string, error) {
	text, err := d.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, metadata.Namespace, impact)
	if errors.Is(err, libvirt.ERR_NO_DOMAIN_METADATA) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading the metadata of %s: %w", d.name, err)
	}
	return text, nil
}

// setElement puts the policy's clock element where impact says, or removes it (nil).
func (d *domain) setElement(policy *metadata.Policy, impact libvirt.DomainModificationImpact) error {
	text := ""
	if policy != nil {
		text = bare(policy.XML())
	}
	err := d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, text, metadata.Prefix, metadata.Namespace, impact)
	if err != nil {
		return fmt.Errorf("writing the metadata of %s: %w", d.name, err)
	}
	return nil
}

// bare takes prefix and namespace from a clock element of ours: virDomainSetMetadata adds them, and refuses an
// element that declares the prefix already.
func bare(element string) string {
	return strings.NewReplacer(
		" xmlns:"+metadata.Prefix+`="`+metadata.Namespace+`"`, "",
		metadata.Prefix+":", "",
	).Replace(element)
}

func isUUID(s string) bool {
	_, ok := machine.UUID(s)
	return ok
}
