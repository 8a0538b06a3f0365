package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
)

// managedByXPath is what docs/install.md gives virt-install and virt-xml to make a domain managed.
const managedByXPath = "./metadata/clock/@xmlns=urn:ftclock:domain:1"

// tool runs a program of virtinst's, or leaves the test out where it is missing.
func tool(t *testing.T, name, debian string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		privatelibvirt.LeaveOut(t, "no "+name+": apt-get install "+debian)
	}
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	out := check.Output(t, cmd)
	return string(out)
}

// corrected makes a checkpoint of a running domain and checks that it was caught up.
func corrected(t *testing.T, d *privatelibvirt.Domain) {
	t.Helper()
	clock := domaintest.Clock(t, d)
	holds(t, d, clock, 20)
	if s := status(t, d); s.State != control.Correcting || s.Dropped+s.Anchored != 20 {
		t.Errorf("status: %+v", s)
	}
}

func TestKVMVirtInstallMakesAManagedDomain(t *testing.T) {
	tool(t, "virt-install", "virtinst", "--connect", privatelibvirt.URI, "--name", "installed", "--memory", "32", "--machine", "pc",
		"--cpu", "qemu64,check=none", "--memorybacking", "source.type=memfd,access.mode=shared", "--disk", "none", "--network", "none",
		"--osinfo", "generic", "--graphics", "none", "--controller", "usb,model=none", "--boot", "kernel="+elf, "--import",
		"--noautoconsole", "--xml", managedByXPath)
	found := check.Value(conn.LookupDomainByName("installed"))(t)
	d := &privatelibvirt.Domain{Domain: found, Name: "installed"}
	defer func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
		nothingLeft(t)
	}()
	corrected(t, d)
}

func TestKVMVirtXMLMakesADomainManaged(t *testing.T) {
	x := managed("edited", `<other xmlns="urn:somebody.else">kept</other>`)
	d := define(t, x)
	tool(t, "virt-xml", "virtinst", "--connect", privatelibvirt.URI, "edited", "--edit", "--xml", managedByXPath)
	if text, err := d.GetXMLDesc(0); err != nil || !strings.Contains(text, ">kept</other>") {
		t.Errorf("what was in the metadata is gone: %v\n%s", err, text)
	}
	check.NoError(t, d.Create())
	corrected(t, d)
}

// libvirt's own schema takes every snippet within a domain, and what ftclock makes of one.
func TestKVMDomainsStayValid(t *testing.T) {
	dir := t.TempDir()
	validate := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name+".xml")
		check.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		tool(t, "virt-xml-validate", "libvirt-clients", file, "domain")
	}
	snippets := check.Value(filepath.Glob("../../xml-templates/snippets/*.xml"))(t)
	if len(snippets) == 0 {
		t.Fatal("no snippets")
	}
	for _, file := range snippets {
		name := strings.TrimSuffix(filepath.Base(file), ".xml")
		snippet := check.Value(os.ReadFile(file))(t)
		text := check.Value(privatelibvirt.GuestXML("valid", elf).Marshal())(t)
		if name == "preload" {
			text = strings.Replace(text, "</domain>", string(snippet)+"</domain>", 1)
		} else {
			text = strings.Replace(text, "<memory ", "<metadata>"+string(snippet)+"</metadata><memory ", 1)
		}
		validate(name, text) // as it was pasted
		d, err := conn.DomainDefineXML(text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if name == "preload" {
			ftclock(t, "enable", "valid", "--preload")
		}
		text = check.Value(d.GetXMLDesc(0))(t)
		if !strings.Contains(text, "urn:ftclock:domain:1") {
			t.Errorf("%s: the element is gone:\n%s", name, text)
		}
		validate(name+"-defined", text) // as libvirt gives it
		check.NoError(t, d.Undefine())
	}
}
