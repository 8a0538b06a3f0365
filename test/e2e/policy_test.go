package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/control"
	"ftclock/policy"
	"ftclock/test/check"
	"ftclock/test/domaintest"

	"libvirt.org/go/libvirtxml"
)

// novaMetadata is what OpenStack's Nova writes of an instance, shortened.
const novaMetadata = `<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"><nova:name>vm</nova:name>` +
	`<nova:flavor name="FLAVOR"><nova:memory>32</nova:memory></nova:flavor></nova:instance>`

// A domain that Nova defines, and defines anew at each hard reboot, has none of our metadata: the host's policy for its flavor has
// it served from its start. One of another flavor is left alone, and so are all while the file is broken.
func TestKVMTheHostsPolicy(t *testing.T) {
	check.NoError(t, os.MkdirAll(policy.Dir, 0o755))
	t.Cleanup(func() { _ = os.RemoveAll(policy.Dir) })
	file := filepath.Join(policy.Dir, "nova.xml")
	write := func(text string) {
		t.Helper()
		check.NoError(t, os.WriteFile(file, []byte(text), 0o644))
	}
	write(`<policy xmlns="urn:ftclock:policy:1">
  <for namespace="http://openstack.org/xmlns/libvirt/nova/1.1" element="flavor" attribute="name" value="ha.*"/>
  <clock xmlns="urn:ftclock:domain:1"><on event="checkpoint" limit="15m"/></clock>
</policy>`)
	nova := func(name, flavor string) *libvirtxml.Domain {
		x := managed(name, "")
		x.Metadata = &libvirtxml.DomainMetadata{XML: strings.Replace(novaMetadata, "FLAVOR", flavor, 1)}
		return x
	}
	served := func(t *testing.T) {
		t.Helper()
		d, clock := start(t, nova("instance-1", "ha.large"))
		before := offset(t, clock)
		pauses(t, d, 20, 5*time.Millisecond)
		domaintest.Kept(t, clock, before, "20 pauses under the host's policy")
		if s := status(t, d); s.State != control.Correcting || s.Mode != control.Relay || s.Policy != file || s.Dropped+s.Anchored != 20 {
			t.Errorf("status: %+v", s)
		}
		if out := ftclock(t, "status", "instance-1"); !strings.Contains(out, "the host's, from "+file) {
			t.Error("status doesn't say where the policy is from")
		}
	}
	t.Run("started", served)
	t.Run("defined anew, as by a hard reboot", served)
	t.Run("another flavor", func(t *testing.T) {
		d, clock := start(t, nova("instance-2", "m1.small"))
		before := offset(t, clock)
		pauses(t, d, 5, 20*time.Millisecond)
		if lost := offset(t, clock) - before; lost < 80_000_000 {
			t.Errorf("it lost only %d ns", lost)
		}
		if shims := shims(); len(shims) > 0 {
			t.Errorf("it has shims: %v", shims)
		}
	})
	t.Run("a broken file", func(t *testing.T) {
		write("<policy")
		start(t, nova("instance-1", "ha.large"))
		if shims := shims(); len(shims) > 0 {
			t.Errorf("it has shims: %v", shims)
		}
	})
}
