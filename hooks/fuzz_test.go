package hooks

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/control"
	"ftclock/spawn"
	"ftclock/test/check"
)

// FuzzHookInput calls the hook with anything on its stdin. Whatever that is, the hook says at most one line, touches
// nothing outside the domain's own directory, and either starts a shim or leaves all as it was.
func FuzzHookInput(f *testing.F) {
	for _, xml := range []string{
		"", "<domain/>", domainXML(""), domainXML(clock), domainXML(clock + clock), strings.Replace(domainXML(clock), "kvm", "qemu", 1),
		strings.Replace(domainXML(clock), "id='7'", "id='-1'", 1), strings.Replace(domainXML(clock), uuid, "../../x", 1),
		domainXML(directClock),
		domainXML(`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="no"><ftclock:on event="x"/></ftclock:clock>`),
	} {
		for _, op := range []string{"start begin", "started begin", "prepare begin", "release end", "reconnect begin", "migrate begin"} {
			f.Add([]byte(xml), op, true)
		}
		f.Add([]byte(xml), "start begin", false)
		f.Add([]byte(xml), "started begin", false)
	}
	root := f.TempDir()
	lib := filepath.Join(root, "l")
	dir := filepath.Join(lib, "domain-7-a name longer than t")
	check.NoError(f, os.MkdirAll(dir, 0o755))
	outside := filepath.Join(root, "outside")
	check.NoError(f, os.WriteFile(outside, nil, 0o600))
	running(f, Host{Root: root, Run: "run"})
	f.Fuzz(func(t *testing.T, xml []byte, op string, works bool) {
		monitor, renamed := filepath.Join(dir, control.MonitorSocket), filepath.Join(dir, control.QEMUSocket)
		_ = os.Remove(renamed)
		check.NoError(t, os.WriteFile(monitor, nil, 0o600))
		started, noted := 0, 0
		h := Host{Root: root, Lib: lib, Run: "run", State: filepath.Join(root, "s"),
			Start: func(_ context.Context, o spawn.Spec) error {
				started++
				if (op == "start begin") != (o.DomainDir == dir) || (op == "started begin") != (o.PID == 4711) || o.Clock == "" { // the shim itself refuses what is no UUID
					t.Errorf("started with %+v", o)
				}
				if works {
					return nil
				}
				return context.DeadlineExceeded
			},
			Note: func(_, warning string) {
				noted++
				if strings.Contains(warning, "\n") {
					t.Errorf("noted more than a line: %q", warning)
				}
			}}
		first, second, _ := strings.Cut(op, " ")
		var stderr bytes.Buffer
		code := Run(h, []string{"a name", first, second, "-"}, bytes.NewReader(xml), &stderr)
		line := strings.TrimSuffix(stderr.String(), "\n")
		switch {
		case code != 0 && (op != "start begin" && op != "started begin" || code != 1):
			t.Errorf("%s gave %d: %s", op, code, line)
		case code == 0 && line != "", code != 0 && line == "", strings.ContainsAny(line, "\n\r\x00\x1b"), len(line) > 4096:
			t.Errorf("code %d, said %q", code, line)
		case started > 1 || started == 1 && op != "start begin" && op != "started begin":
			t.Errorf("%s started %d shims", op, started)
		case noted > 0 && (code != 0 || started == 1 && works):
			t.Errorf("noted, code %d", code)
		}
		in := monitor
		if started == 1 && works && op == "start begin" {
			in = renamed
		}
		if _, err := os.Stat(in); err != nil {
			t.Errorf("the socket isn't where it belongs: %v", err)
		}
		if _, err := os.Stat(outside); err != nil {
			t.Error(err)
		}
	})
}
