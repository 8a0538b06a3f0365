package hooks

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"

func domainXML(inner string) string {
	return `<domain type='kvm' id='7'><name>a name longer than twenty characters</name><uuid>` + uuid + `</uuid>
<metadata>` + inner + `</metadata><os><type>hvm</type></os></domain>`
}

const clock = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`

// newHost is a host of its own with one domain about to start; a fake starter stands for the shim.
func newHost(t *testing.T, start func(spawn.Spec) error) (h Host, dir string, listener *net.UnixListener) {
	t.Helper()
	root := t.TempDir()
	h = Host{Root: root, Lib: filepath.Join(root, "l"), Run: "/run/libvirt/qemu", State: filepath.Join(root, "s")}
	h.Note = func(domain, warning string) {
		if warning != "starting uncorrected: no such luck; and more; `ftclock doctor` checks the host" {
			t.Errorf("noted of %s: %q", domain, warning)
		}
	}
	h.Start = func(_ context.Context, o spawn.Spec) error { return start(o) }
	dir = filepath.Join(h.Lib, "domain-7-a name longer than t")
	for _, d := range []string{dir, filepath.Join(h.Lib, "domain-70-a name"), filepath.Join(h.Lib, "domain-7-other")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A socket's address is short; the directory of a test may not be.
	t.Chdir(dir)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: control.MonitorSocket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	t.Cleanup(func() { listener.Close() })
	return h, dir, listener
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return strings.Join(all, " ")
}

func TestStartPutsAShimBetween(t *testing.T) {
	var got spawn.Spec
	h, dir, _ := newHost(t, func(o spawn.Spec) error { got = o; return nil })
	var stderr bytes.Buffer
	if code := Run(h, []string{"name", "start", "begin", "-"}, strings.NewReader(domainXML(clock)), &stderr); code != 0 || stderr.Len() > 0 {
		t.Fatalf("code %d, %s", code, &stderr)
	}
	if n := names(t, dir); n != control.QEMUSocket {
		t.Errorf("in the directory: %s", n)
	}
	want := spawn.Spec{UUID: uuid, Name: "a name longer than twenty characters", Clock: got.Clock, DomainDir: dir,
		PIDFile: "/run/libvirt/qemu/a name longer than twenty characters.pid"}
	if got != want || !strings.Contains(got.Clock, "urn:ftclock:domain:1") {
		t.Errorf("shim started with %+v", got)
	}
}

const directClock = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" monitor="direct"/>`

// running puts a QEMU of the domain's into a host's /proc, and its pid where libvirt has it.
func running(t testing.TB, h Host) {
	t.Helper()
	proc, run := filepath.Join(h.Root, "proc/4711"), filepath.Join(h.Root, h.Run)
	for path, text := range map[string]string{
		filepath.Join(run, "a name longer than twenty characters.pid"): "4711",
		filepath.Join(proc, "cmdline"):                                 "qemu\x00-uuid\x00" + uuid + "\x00",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/usr/bin/qemu-system-x86_64", filepath.Join(proc, "exe")); err != nil {
		t.Fatal(err)
	}
}

// Nothing is done at the start; when QEMU runs, a shim is started beside it, which knows what a relay would.
func TestADirectMonitorIsLeftAlone(t *testing.T) {
	anchor := metadata.Anchor{Clock: 5, Real: 6, Boot: "b"}
	with := strings.Replace(anchor.XML(), "<anchor", `<ftclock-anchor:anchor xmlns:ftclock-anchor="urn:ftclock:anchor:1"`, 1)
	for _, incoming := range []string{"", control.Migrated, control.Restored} {
		t.Run(incoming, func(t *testing.T) {
			var got []spawn.Spec
			h, dir, _ := newHost(t, func(o spawn.Spec) error { got = append(got, o); return nil })
			ops := [][]string{{"n", "start", "begin", "-"}, {"n", "started", "begin", "-"}}
			switch incoming {
			case control.Migrated:
				ops = append([][]string{{"n", "migrate", "begin", "-"}}, ops...)
			case control.Restored:
				ops = append([][]string{{"n", "restore", "begin", "-"}}, ops...)
			}
			for _, op := range ops {
				if op[1] == "started" {
					if len(got) > 0 {
						t.Errorf("started before QEMU: %+v", got)
					}
					running(t, h)
				}
				var stderr bytes.Buffer
				if code := Run(h, op, strings.NewReader(domainXML(directClock+with)), &stderr); code != 0 || stderr.Len() > 0 {
					t.Fatalf("%v: code %d, %s", op, code, &stderr)
				}
				if n := names(t, dir); n != control.MonitorSocket {
					t.Errorf("in the directory after %v: %s", op, n)
				}
			}
			want := spawn.Spec{UUID: uuid, Name: "a name longer than twenty characters", Clock: directClock, PID: 4711,
				Incoming: incoming, Anchor: anchor.XML()}
			if len(got) != 1 || got[0] != want {
				t.Errorf("started with %+v", got)
			}
			if _, err := os.Stat(h.notePath(uuid)); err == nil {
				t.Error("the note is left")
			}
		})
	}
}

// A relay was started before QEMU: then there is nothing to do.
func TestARelayedDomainHasStarted(t *testing.T) {
	h, _, _ := newHost(t, func(spawn.Spec) error { t.Error("a shim was started"); return nil })
	running(t, h)
	for _, xml := range []string{
		domainXML(clock), domainXML(strings.Replace(clock, "/>", ` monitor="relayed"/>`, 1)),
		// The start has noted why it can't be served.
		strings.Replace(domainXML(strings.Replace(directClock, "/>", ` required="no"/>`, 1)), "'kvm'", "'qemu'", 1),
	} {
		var stderr bytes.Buffer
		if code := Run(h, []string{"n", "started", "begin", "-"}, strings.NewReader(xml), &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("code %d, %s", code, &stderr)
		}
	}
}

// A domain that runs already is given up where it requires its clock.
func TestADirectDomainThatCantBeServed(t *testing.T) {
	for _, c := range []struct {
		required string
		runs     bool
		want     string
	}{
		{"yes", true, "ftclock: starting domain name: no such luck; and more\n"},
		{"no", true, "starting uncorrected: no such luck; and more; `ftclock doctor` checks the host"},
		{"yes", false, "ftclock: starting domain name: finding the QEMU of a name longer than twenty characters: "},
		{"no", false, "starting uncorrected: finding the QEMU of a name longer than twenty characters: "},
	} {
		h, dir, _ := newHost(t, func(spawn.Spec) error { return errors.New("no such luck\nand more") })
		if c.runs {
			running(t, h)
		}
		var stderr bytes.Buffer
		noted := ""
		h.Note = func(_, warning string) { noted += warning }
		xml := domainXML(strings.Replace(directClock, "/>", ` required="`+c.required+`"/>`, 1))
		code := Run(h, []string{"name", "started", "begin", "-"}, strings.NewReader(xml), &stderr)
		said, silent, wantCode := stderr.String(), noted, 1
		if c.required == "no" {
			said, silent, wantCode = noted, stderr.String(), 0
		}
		if code != wantCode || !strings.HasPrefix(said, c.want) || silent != "" {
			t.Errorf("%+v: code %d, %q, noted %q", c, code, &stderr, noted)
		}
		if n := names(t, dir); n != control.MonitorSocket {
			t.Errorf("in the directory: %s", n)
		}
	}
}

// A host that lost power left directories behind, and counts its starts from 1 again.
func TestLeftoversOfALostHostAreNoObstacle(t *testing.T) {
	left := func(dir string, listens bool, names ...string) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			t.Chdir(dir)
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			if listens {
				t.Cleanup(func() { l.Close() })
			} else {
				l.Close()
			}
		}
	}
	for name, c := range map[string]struct {
		before func(h Host, dir string)
		fails  string
	}{
		"QEMU's socket of the last boot": {func(_ Host, dir string) { left(dir, false, control.QEMUSocket) }, ""},
		"a file in its place":            {func(_ Host, dir string) { _ = os.WriteFile(filepath.Join(dir, control.QEMUSocket), nil, 0o600) }, ""},
		"a QEMU that runs":               {func(_ Host, dir string) { left(dir, true, control.QEMUSocket) }, "something listens on monitor.qemu already"},
		"a domain whose name is a beginning of this one's": {func(h Host, _ string) {
			left(filepath.Join(h.Lib, "domain-7-a"), false, control.QEMUSocket, control.MonitorSocket)
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got spawn.Spec
			h, dir, _ := newHost(t, func(o spawn.Spec) error { got = o; return nil })
			c.before(h, dir)
			var stderr bytes.Buffer
			code := Run(h, []string{"name", "start", "begin", "-"}, strings.NewReader(domainXML(clock)), &stderr)
			if c.fails != "" {
				if out := stderr.String(); code != 1 || !strings.Contains(out, c.fails) || names(t, dir) != control.QEMUSocket+" "+control.MonitorSocket {
					t.Errorf("code %d, %q; in the directory: %s", code, out, names(t, dir))
				}
				return
			}
			if code != 0 || got.DomainDir != dir {
				t.Fatalf("code %d, %s; served in %s", code, &stderr, got.DomainDir)
			}
			if n := names(t, dir); n != control.QEMUSocket {
				t.Errorf("in the directory: %s", n)
			}
			t.Chdir(dir)
			if conn, err := net.Dial("unix", control.QEMUSocket); err != nil {
				t.Errorf("libvirt's listening socket isn't there: %v", err)
			} else {
				conn.Close()
			}
		})
	}
}

// The rule is libvirt's, with a locale of multi-byte characters and without one.
func TestTheDirectoryIsThatOfThisStart(t *testing.T) {
	long := strings.Repeat("x", 255)
	for _, c := range []struct{ name, short string }{
		{"v", "v"}, {"vm10", "vm10"}, {"a-b - c", "a-b - c"}, {"100%s &<x>", "100%s &<x>"}, {long, long[:20]},
		{"exactly twenty chars", "exactly twenty chars"}, {"twenty-one characters", "twenty-one character"},
		{"gäste für die prüfung, länger", "gäste für die prüfun"}, {"gäste für die prüfung, länger", "gäste für die prü"},
		{"gäste für die pr-\u00e9", "gäste für die pr-\xc3"}, {strings.Repeat("界", 85), strings.Repeat("界", 20)},
		{strings.Repeat("界", 85), strings.Repeat("界", 6) + "\xe7\x95"}, {"界", "界"}, {"..", ".."},
	} {
		h := Host{Lib: t.TempDir()}
		want := filepath.Join(h.Lib, "domain-7-"+c.short)
		others := []string{want, filepath.Join(h.Lib, "domain-7-"+c.name[:len(c.name)/2]), filepath.Join(h.Lib, "domain-77-"+c.short)}
		for i, dir := range others {
			if i > 0 && dir == want {
				continue
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, control.MonitorSocket), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := h.domainDir(metadata.Domain{ID: 7, Name: c.name}); err != nil || got != want {
			t.Errorf("%q: %q, not %q: %v", c.name, got, want, err)
		}
		if err := os.RemoveAll(want); err != nil {
			t.Fatal(err)
		}
		if got, err := h.domainDir(metadata.Domain{ID: 7, Name: c.name}); err == nil {
			t.Errorf("%q: %q is another's", c.name, got)
		}
	}
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	for _, required := range []string{"yes", "no"} {
		var stderr bytes.Buffer
		h, dir, _ := newHost(t, func(o spawn.Spec) error {
			// As a shim that was killed after it had bound the socket.
			_ = os.WriteFile(filepath.Join(o.DomainDir, control.MonitorSocket), nil, 0o600)
			return errors.New("no such luck\nand more")
		})
		xml := domainXML(`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" required="` + required + `"/>`)
		code := Run(h, []string{"name", "start", "begin", "-"}, strings.NewReader(xml), &stderr)
		if required == "yes" && (code != 1 || stderr.String() != "ftclock: starting domain name: no such luck; and more\n") {
			t.Errorf("code %d, %q", code, &stderr)
		}
		if required == "no" && (code != 0 || stderr.Len() > 0) {
			t.Errorf("not required: code %d, %q", code, &stderr)
		}
		if n := names(t, dir); n != control.MonitorSocket {
			t.Errorf("in the directory: %s", n)
		}
		info, err := os.Stat(filepath.Join(dir, control.MonitorSocket))
		if err != nil || info.Mode().Type() != os.ModeSocket {
			t.Errorf("libvirt's socket isn't back: %v, %v", info, err)
		}
	}
}

func TestBadInputIsRefusedInOneLine(t *testing.T) {
	h, dir, _ := newHost(t, func(spawn.Spec) error { t.Error("a shim was started"); return nil })
	for name, xml := range map[string]string{
		"unknown attribute":  domainXML(`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" mode="x"/>`),
		"unknown monitor":    domainXML(strings.Replace(directClock, "direct", "none", 1)),
		"direct, wrong type": strings.Replace(domainXML(directClock), "'kvm'", "'qemu'", 1),
		"broken XML":         domainXML(clock)[:200] + "<urn:ftclock:domain:1",
		"wrong type":         strings.Replace(domainXML(clock), "'kvm'", "'qemu'", 1),
		"no id":              strings.Replace(domainXML(clock), "id='7'", "", 1),
		"unknown id":         strings.Replace(domainXML(clock), "id='7'", "id='8'", 1),
		"too long":           domainXML(clock) + strings.Repeat(" ", maxInput),
	} {
		var stderr bytes.Buffer
		code := Run(h, []string{"name", "start", "begin", "-"}, strings.NewReader(xml), &stderr)
		if out := stderr.String(); code != 1 || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "ftclock: starting domain name: ") {
			t.Errorf("%s: code %d, %q", name, code, out)
		}
	}
	if n := names(t, dir); n != control.MonitorSocket {
		t.Errorf("in the directory: %s", n)
	}
}

func TestEverythingElseIsLeftAlone(t *testing.T) {
	h, dir, _ := newHost(t, func(spawn.Spec) error { t.Error("a shim was started"); return nil })
	for _, xml := range []string{
		domainXML(""), "", "no XML", "<ftclock", domainXML("<!-- urn:ftclock:domain:1 -->"),
	} {
		for _, op := range [][]string{
			{"n", "prepare", "begin", "-"}, {"n", "start", "begin", "-"}, {"n", "started", "begin", "-"},
			{"n", "stopped", "end", "-"}, {"n", "release", "end", "-"}, {"n", "reconnect", "begin", "-"},
			{"n", "restore", "begin", "-"}, {"n", "migrate", "begin", "-"}, {"n", "attach", "begin", "-"},
		} {
			var stderr bytes.Buffer
			if code := Run(h, op, strings.NewReader(xml), &stderr); code != 0 || stderr.Len() > 0 {
				t.Errorf("%v with %.40q: code %d, %s", op, xml, code, &stderr)
			}
		}
	}
	// With our metadata, even broken, only the start may fail.
	for _, op := range []string{"prepare", "started", "stopped", "release", "reconnect", "restore", "migrate"} {
		var stderr bytes.Buffer
		if code := Run(h, []string{"n", op, "begin", "-"}, strings.NewReader(domainXML(clock)+"<"), &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: code %d, %s", op, code, &stderr)
		}
	}
	if n := names(t, dir); n != control.MonitorSocket {
		t.Errorf("in the directory: %s", n)
	}
}

// libvirt says in a call of its own that a state comes in, and which way; the start after it, and only that, knows.
func TestAnIncomingStateIsKnownAtTheStart(t *testing.T) {
	anchor := metadata.Anchor{Clock: 5, Real: 6, Boot: "b"}
	with := strings.Replace(anchor.XML(), "<anchor", `<ftclock-anchor:anchor xmlns:ftclock-anchor="urn:ftclock:anchor:1"`, 1)
	broken := strings.Replace(with, `clock="5"`, `clock="five"`, 1)
	for name, c := range map[string]struct {
		ops, xml         string
		incoming, anchor string
		noted            bool
	}{
		"migrated":                  {"migrate begin, start begin", clock + with, control.Migrated, anchor.XML(), false},
		"restored":                  {"restore begin, start begin", clock + with, control.Restored, anchor.XML(), false},
		"without an anchor":         {"migrate begin, start begin", clock, control.Migrated, "", false},
		"with a broken one":         {"migrate begin, start begin", clock + broken, control.Migrated, "", true},
		"a start":                   {"start begin", clock + with, "", anchor.XML(), false},
		"a start with a broken one": {"start begin", clock + broken, "", "", false},
		"a later start":             {"migrate begin, release end, start begin", clock, "", "", false},
		"an old note":               {"migrate begin, age, start begin", clock, "", "", false},
		"another end":               {"migrate end, start begin", clock, "", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			var got spawn.Spec
			h, _, _ := newHost(t, func(o spawn.Spec) error { got = o; return nil })
			noted := ""
			h.Note = func(_, warning string) { noted += warning }
			for _, op := range strings.Split(c.ops, ", ") {
				if op == "age" {
					old := time.Now().Add(-time.Hour)
					if err := os.Chtimes(h.notePath(uuid), old, old); err != nil {
						t.Fatal(err)
					}
					continue
				}
				first, second, _ := strings.Cut(op, " ")
				var stderr bytes.Buffer
				if code := Run(h, []string{"n", first, second, "-"}, strings.NewReader(domainXML(c.xml)), &stderr); code != 0 || stderr.Len() > 0 {
					t.Fatalf("%s: code %d, %s", op, code, &stderr)
				}
			}
			if got.Incoming != c.incoming || got.Anchor != c.anchor {
				t.Errorf("started with %+v", got)
			}
			if c.noted != strings.Contains(noted, `its clock is "five"`) || !c.noted && noted != "" {
				t.Errorf("noted %q", noted)
			}
			if _, err := os.Stat(h.notePath(uuid)); err == nil {
				t.Error("the note is left")
			}
		})
	}
}

// The shim in here is a fake: it only notes what it is asked.
func TestReleaseEndsTheShim(t *testing.T) {
	h, _, _ := newHost(t, func(spawn.Spec) error { return nil })
	dir := filepath.Join(h.State, uuid)
	release := func() {
		t.Helper()
		if code := Run(h, []string{"n", "release", "end", "-"}, strings.NewReader(domainXML(clock)), os.Stderr); code != 0 {
			t.Fatal(code)
		}
	}
	release() // nothing there: nothing happens
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	release()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dead shim's directory is still there: %v", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, control.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	asked := make(chan string, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		var request control.Request
		_ = control.Receive(conn, &request)
		_ = control.Send(conn, control.Answer{})
		asked <- request.Do
	}()
	release()
	if got := <-asked; got != "quit" {
		t.Errorf("the shim was asked to %q", got)
	}
}

// A shim that too many wait for lives: nothing of its is removed.
func TestReleaseLeavesAShimThatIsBusy(t *testing.T) {
	h, _, _ := newHost(t, func(spawn.Spec) error { return nil })
	dir := filepath.Join(h.State, uuid)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	address := &unix.SockaddrUnix{Name: filepath.Join(dir, control.SocketName)}
	open := func() int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}
	listener := open()
	if err := errors.Join(unix.Bind(listener, address), unix.Listen(listener, 0)); err != nil {
		t.Fatal(err)
	}
	for err := error(nil); !errors.Is(err, unix.EAGAIN); {
		if err = unix.Connect(open(), address); err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
	}
	if code := Run(h, []string{"n", "release", "end", "-"}, strings.NewReader(domainXML(clock)), os.Stderr); code != 0 {
		t.Error(code)
	}
	if _, err := os.Stat(filepath.Join(dir, control.SocketName)); err != nil {
		t.Error(err)
	}
	if _, err := control.Ask(h.State, uuid, control.Request{Do: "status"}); err == nil || errors.Is(err, control.ErrGone) || errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is said to be gone: %v", err)
	}
}
