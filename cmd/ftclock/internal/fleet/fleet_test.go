package fleet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
)

// fakeAlias looks aliases up in a libvirt.conf that is made up.
func fakeAlias(alias string) (string, error) {
	uri := map[string]string{"mock": "test:///default", "node1": "qemu+ssh://root@a:22/system", "old": "qemu+tls://a/system"}[alias]
	if uri == "" {
		return "", errors.New("no alias " + alias)
	}
	return uri, nil
}

func TestHosts(t *testing.T) {
	t.Setenv("LIBVIRT_DEFAULT_URI", "qemu+ssh://default/system")
	here, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		uris  []string
		names string
	}{
		{nil, "ssh default"},
		{[]string{"qemu:///system"}, here},
		{[]string{"qemu:///system", "qemu+ssh://b/system", "qemu:///system", "qemu+ssh://root@a:22/system", "qemu+ssh://b/system"}, here + ", ssh b, ssh a:22"},
		{[]string{"test:///default"}, here},
		{[]string{"mock"}, here},
		{[]string{"node1", "mock", "qemu+ssh://root@a:22/system", "node1"}, "ssh a:22, " + here},
		{[]string{"qemu+unix:///system?socket=/run/x"}, here},
		{[]string{"qemu+ssh://[2001:db8::1]:22/system"}, "ssh [2001:db8::1]:22"},
	} {
		hosts, err := hosts(test.uris, fakeAlias)
		var names []string
		for _, h := range hosts {
			if h.Remote() {
				h.Name = "ssh " + h.Name
			}
			names = append(names, h.Name)
		}
		if got := strings.Join(names, ", "); err != nil || got != test.names {
			t.Errorf("%q: %s, %v, want %s", test.uris, got, err, test.names)
		}
	}
}

// What isn't plain is refused before ssh sees it.
func TestHostsRefuse(t *testing.T) {
	for uri, want := range map[string]string{
		"qemu+ssh://-oProxyCommand=x/system":        "no name of a host",
		"qemu+ssh:///system":                        "no name of a host",
		"qemu+ssh://a%20b/system":                   "invalid URL escape",
		"qemu+ssh://a$(id)/system":                  "no name of a host",
		"qemu+ssh://-lroot@a/system":                "no name of a user",
		"qemu+ssh://a%3Bb@a/system":                 "no name of a user",
		"qemu+ssh://me:secret@a/system":             "a password can't be given",
		"qemu+ssh://a/system?command=/tmp/x":        `the parameter "command" isn't supported`,
		"qemu+ssh://a/session":                      "is not supported",
		"qemu+tls://a/system":                       "carries libvirt alone",
		"qemu://a/system":                           "carries libvirt alone",
		"qemu+tcp://a/system":                       "carries libvirt alone",
		"qemu+ssh://a/system?keyfile=%zz&command=x": "invalid URL escape",
	} {
		if hosts, err := Hosts([]string{uri}); err == nil || !strings.Contains(err.Error(), want) || ui.HintOf(err) == "" {
			t.Errorf("%s: %+v, %v, want %q and a hint", uri, hosts, err, want)
		}
	}
	for alias, want := range map[string]string{"nobody": "no alias nobody", "old": "qemu+tls://a/system carries libvirt alone"} {
		if _, err := hosts([]string{alias}, fakeAlias); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", alias, err)
		}
	}
	t.Setenv("LIBVIRT_DEFAULT_URI", "node1")
	if all, err := hosts(nil, fakeAlias); err != nil || len(all) != 1 || all[0].Name != "a:22" {
		t.Errorf("the default is an alias: %+v, %v", all, err)
	}
	if _, err := Hosts([]string{"qemu:///system", "test:///default"}); err == nil || !strings.Contains(err.Error(), "both this host") {
		t.Error(err)
	}
}

// The real ssh understands what it is given: its own -G prints what it would do. No connection is made.
func TestSSHUnderstands(t *testing.T) {
	if _, err := exec.LookPath("ssh"); err != nil {
		if os.Getenv("FTCLOCK_REQUIRE") != "" {
			t.Fatal("missing: ssh; fix: apt-get install openssh-client")
		}
		t.Skip("missing: ssh; fix: apt-get install openssh-client")
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	hosts, err := Hosts([]string{"qemu+ssh://ops@far.example:2222/system?keyfile=" + key + "&no_verify=1&socket=/run/x"})
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ssh", append([]string{"-F", "/dev/null", "-G"}, hosts[0].ssh...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(string(out), "\n")
	for _, want := range []string{"hostname far.example", "user ops", "port 2222", "batchmode yes", "connecttimeout 10", "identityfile " + key,
		"forwardagent no", "forwardx11 no", "requesttty false", "stricthostkeychecking false", "clearallforwardings yes", "escapechar none"} {
		if !slices.Contains(lines, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// standIn puts a stand-in for ssh first in PATH: a shell script, which is given ssh's arguments.
func standIn(t *testing.T, script string) Host {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte("#!/bin/sh\n# A stand-in for ssh.\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	hosts, err := Hosts([]string{"qemu+ssh://ops@far:22/system"})
	if err != nil {
		t.Fatal(err)
	}
	return hosts[0]
}

func TestAsk(t *testing.T) {
	h := standIn(t, `while [ "$1" != -- ]; do shift; done
[ "$*" = "-- far ftclock -c qemu:///system status --format json --records 7" ] || exit 9
echo 'ftclock: warning: libvirt sleeps' >&2
echo '[{"name":"web","uuid":"1","version":"2","state":"correcting","pauses":3,"from_a_newer_one":[1]}, {"name":"x","uuid":"2","state":"off"}]'
exit 1`)
	a, err := h.Ask(t.Context(), 7)
	if err != nil || len(a.Entries) != 2 || !slices.Equal(a.Warnings, []string{"libvirt sleeps"}) {
		t.Fatalf("%+v, %v", a, err)
	}
	web, off := a.Entries[0], a.Entries[1]
	if web.On != "far:22" || web.Name != "web" || web.Version != "2" || web.Pauses != 3 || web.Mute || web.State != control.Correcting {
		t.Errorf("%+v", web)
	}
	if off.On != "far:22" || !off.Mute || off.State != "off" {
		t.Errorf("%+v", off)
	}
}

func TestAskFails(t *testing.T) {
	for _, test := range []struct{ script, want, hint string }{
		{"echo 'motd' >&2; echo 'ssh: connect to host far port 22: No route to host' >&2; exit 255", "asking far:22: ssh: connect to host far port 22: No route to host", "`ssh -oBatchMode=yes -p 22 ops@far true`"},
		{"exit 255", "it doesn't say why", "ops@far"},
		{"exec no-such-program", "ftclock isn't installed there", "`ssh -p 22 ops@far ftclock --version` must find it"},
		{"echo 'ftclock: error: unknown flag --records' >&2; exit 3", "another version there: unknown flag --records", "ops@far ftclock --version"},
		{"printf 'ftclock: error: listing shims: open /run/ftclock: permission denied\nftclock: hint: run it as root\n' >&2; exit 3", "permission denied", "-c qemu+ssh://root@far:22/system"},
		{"printf 'ftclock: error: no\nftclock: hint: try it\n' >&2; exit 3", "asking far:22: no", "on far:22: try it"},
		{"echo 'Segmentation fault' >&2; exit 139", "ended with 139: Segmentation fault", "`ssh -p 22 ops@far ftclock status` shows"},
		{"echo 'sh: not ours' >&2; exit 3", "isn't this ftclock: sh: not ours", "`ssh -p 22 ops@far ftclock --version`"},
		{"echo 'ftclock: error: no' >&2; exit 3", "asking far:22: no", "`ssh -p 22 ops@far ftclock doctor`"},
		{"echo hello; echo '[]'", "its answer isn't a status", "another version"},
		{`echo '{"domains":[]}'`, "its answer isn't a status", "another version"},
		{`echo '[{"name":"web","uuid":"1","state":"\u001b[2J"}]'`, "its answer isn't a status", "another version"},
		{`echo '[{"uuid":"1","state":"off"}]'`, "its answer isn't a status", "another version"},
		{"echo This account is closed; exit 1", "its answer isn't a status", "another version"},
		{"kill -9 $$", "ended with -1", "`ssh -p 22 ops@far ftclock status` shows"},
		{fmt.Sprintf("head -c %d /dev/zero >&2; exit 255", maxErrors+1), "it says more than", "`ssh -p 22 ops@far true` must print nothing"},
	} {
		h := standIn(t, test.script)
		a, err := h.Ask(t.Context(), 1)
		if err == nil || !strings.HasPrefix(err.Error(), "asking far:22: ") || !strings.Contains(err.Error(), test.want) || !strings.Contains(ui.HintOf(err), test.hint) || ui.HintOf(err) == "" {
			t.Errorf("%s: %+v, %v (%s), want %q (%s)", test.script, a, err, ui.HintOf(err), test.want, test.hint)
		}
	}
	t.Setenv("PATH", t.TempDir())
	hosts, _ := Hosts([]string{"qemu+ssh://far/system"})
	if _, err := hosts[0].Ask(t.Context(), 1); err == nil || !strings.Contains(ui.HintOf(err), "openssh-client") {
		t.Error(err)
	}
}

func TestBounded(t *testing.T) {
	b := bounded{max: 3}
	for _, text := range []string{"ab", "c", ""} {
		if n, err := b.Write([]byte(text)); n != len(text) || err != nil {
			t.Error(n, err)
		}
	}
	if _, err := b.Write([]byte("d")); err == nil || !b.over || string(b.text) != "abc" {
		t.Errorf("%v, %+v", err, b)
	}
}

// A host that doesn't answer in time is told of with what can be tried.
func TestAskWaitsBounded(t *testing.T) {
	h := standIn(t, "exec sleep 600")
	_, err := h.askWithin(t.Context(), 1, time.Millisecond)
	if err == nil || err.Error() != "asking far:22: it didn't answer within 1ms" || !strings.Contains(ui.HintOf(err), "`ssh -p 22 ops@far ftclock status` shows") {
		t.Errorf("%v (%s)", err, ui.HintOf(err))
	}
}

// A question ends with its context, whatever ssh does.
func TestAskEnds(t *testing.T) {
	ready := filepath.Join(t.TempDir(), "ready")
	h := standIn(t, "mkfifo "+ready+".fifo; touch "+ready+"; read x <"+ready+".fifo")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := h.Ask(ctx, 1)
		done <- err
	}()
	for {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
