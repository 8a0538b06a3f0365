package hooks

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/control"
	"ftclock/policy"
	"ftclock/spawn"
	"ftclock/test/check"
)

// policies gives a host a policy of these files.
func policies(t *testing.T, h *Host, files map[string]string) {
	t.Helper()
	h.Policies = t.TempDir()
	for name, content := range files {
		text := `<policy xmlns="urn:ftclock:policy:1">` + content + `</policy>`
		check.NoError(t, os.WriteFile(filepath.Join(h.Policies, name), []byte(text), 0o644))
	}
}

const (
	policyClock = `<clock xmlns="urn:ftclock:domain:1"/>`
	flavored    = `<nova:instance xmlns:nova="urn:nova"><nova:flavor name="ha.large"/></nova:instance>`
	forFlavor   = `<for namespace="urn:nova" element="flavor" attribute="name" value="ha.*"/>`
)

// manyPolicies are more files than are used.
func manyPolicies(content string) map[string]string {
	files := map[string]string{}
	for i := range policy.MaxFiles + 1 {
		files[fmt.Sprintf("%02d.xml", i)] = content
	}
	return files
}

// A domain without metadata of ours starts under the host's policy if that names it, and as if there were none if not. What is wrong
// with the policy concerns the domains that it names.
func TestTheHostsPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		files    map[string]string
		metadata string
		clock    string // that the shim starts with; "" is no start
		from     string // the file that it comes from
		refused  string
	}{
		"none":                     {nil, flavored, "", "", ""},
		"for its flavor":           {map[string]string{"a.xml": forFlavor + policyClock}, flavored, clock, "a.xml", ""},
		"for another flavor":       {map[string]string{"a.xml": strings.Replace(forFlavor, "ha.", "m1.", 1) + policyClock}, flavored, "", "", ""},
		"for its name":             {map[string]string{"a.xml": `<for name="a name*"/>` + policyClock}, "", clock, "a.xml", ""},
		"for its UUID":             {map[string]string{"a.xml": `<for uuid="` + uuid + `"/>` + policyClock}, "", clock, "a.xml", ""},
		"two that name it":         {map[string]string{"b.xml": forFlavor + policyClock, "a.xml": forFlavor + strings.Replace(policyClock, "/>", ` required="no"/>`, 1)}, flavored, strings.Replace(clock, "/>", ` required="no"/>`, 1), "a.xml", ""},
		"its own metadata":         {map[string]string{"a.xml": forFlavor + strings.Replace(policyClock, "/>", ` required="no"/>`, 1)}, flavored + clock, clock, "", ""},
		"a broken file":            {map[string]string{"a.xml": "<", "b.xml": forFlavor + policyClock}, flavored, clock, "b.xml", ""},
		"a broken file alone":      {map[string]string{"a.xml": "<"}, flavored, "", "", ""},
		"more files than are used": {manyPolicies(forFlavor + policyClock), flavored, "", "", ""},
		"its own metadata, and more files than are used": {manyPolicies(policyClock), clock, clock, "", ""},
		"a wrong clock for another": {map[string]string{"a.xml": `<for name="x"/>` + strings.Replace(policyClock, "/>", ` mode="x"/>`, 1)},
			flavored, "", "", ""},
		"a wrong clock for it": {map[string]string{"a.xml": forFlavor + strings.Replace(policyClock, "/>", ` mode="x"/>`, 1)},
			flavored, "", "", "/a.xml: /policy/clock/@mode (line 1): unknown attribute"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []spawn.Spec
			h, dir, _ := newHost(t, func(o spawn.Spec) error { got = append(got, o); return nil })
			policies(t, &h, c.files)
			xml := domainXML(c.metadata)
			run := func(op ...string) (int, string) {
				var stderr bytes.Buffer
				return Run(h, append([]string{"name"}, op...), strings.NewReader(xml), &stderr), stderr.String()
			}
			if code, said := run("prepare", "begin", "-"); code != 0 || said != "" {
				t.Errorf("prepare: code %d, %s", code, said)
			}
			if code, said := run("restore", "begin", "-"); code != 0 || said != "" {
				t.Errorf("restore: code %d, %s", code, said)
			}
			code, said := run("start", "begin", "-")
			if c.refused != "" {
				if code != 1 || !strings.HasPrefix(said, "ftclock: starting domain name: ") || !strings.Contains(said, c.refused) || strings.Count(said, "\n") != 1 {
					t.Errorf("code %d, %q", code, said)
				}
			} else if code != 0 || said != "" {
				t.Errorf("code %d, %q", code, said)
			}
			from := ""
			if c.from != "" {
				from = filepath.Join(h.Policies, c.from)
			}
			switch {
			case c.clock == "" && len(got) > 0:
				t.Errorf("started with %+v", got)
			case c.clock != "" && (len(got) != 1 || got[0].Clock != c.clock || got[0].Policy != from || got[0].Incoming != control.Restored):
				t.Errorf("started with %+v, want %s from %q", got, c.clock, from)
			}
			in := control.MonitorSocket
			if c.clock != "" {
				in = control.QEMUSocket
			}
			if n := names(t, dir); n != in {
				t.Errorf("in the directory: %s", n)
			}
			if notes, _ := filepath.Glob(filepath.Join(h.State, "*.incoming")); len(notes) > 0 {
				t.Errorf("left behind: %v", notes)
			}
			if code, said := run("release", "end", "-"); code != 0 || said != "" {
				t.Errorf("release: code %d, %s", code, said)
			}
		})
	}
}

// A domain whose monitor the host's policy leaves alone is served once it runs.
func TestTheHostsPolicyLeavesAMonitorAlone(t *testing.T) {
	var got []spawn.Spec
	h, dir, _ := newHost(t, func(o spawn.Spec) error { got = append(got, o); return nil })
	policies(t, &h, map[string]string{"a.xml": forFlavor + strings.Replace(policyClock, "/>", ` monitor="direct"/>`, 1)})
	running(t, h)
	for _, op := range []string{"start", "started"} {
		var stderr bytes.Buffer
		if code := Run(h, []string{"name", op, "begin", "-"}, strings.NewReader(domainXML(flavored)), &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: code %d, %s", op, code, &stderr)
		}
	}
	if len(got) != 1 || got[0].PID != 4711 || got[0].Clock != directClock || got[0].Policy == "" {
		t.Errorf("started with %+v", got)
	}
	if n := names(t, dir); n != control.MonitorSocket {
		t.Errorf("in the directory: %s", n)
	}
}
