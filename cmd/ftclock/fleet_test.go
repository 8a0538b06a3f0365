package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/control"
)

// standInForSSH puts a stand-in for ssh first in PATH. It runs the command on this machine, with the shims in the host's directory
// below others and libvirt's mock; a host without a directory can't be reached.
func standInForSSH(t *testing.T, others string) {
	t.Helper()
	dir := t.TempDir()
	script := `#!/bin/sh
# A stand-in for ssh.
while [ "$1" != -- ]; do shift; done
host=$2
shift 2
if [ ! -d ` + others + `/$host ]; then
	echo "ssh: connect to host $host port 22: No route to host" >&2
	exit 255
fi
SHIMS=` + others + `/$host exec sh -c "$(echo "$*" | sed s,qemu:///system,test:///default,)"
`
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// keepPicture keeps a screen where FTCLOCK_PICTURES says.
func keepPicture(t *testing.T, name, text string) {
	t.Helper()
	if to := os.Getenv("FTCLOCK_PICTURES"); to != "" {
		if err := os.WriteFile(filepath.Join(to, name), []byte(strings.TrimRight(text, "\n ")+"\n"), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// hostWith is a host of the stand-in, with a domain that is checkpointed for each name.
func hostWith(t *testing.T, others, host string, names ...string) (all []*fakeshim.Shim) {
	t.Helper()
	for i, name := range names {
		f, err := fakeshim.Start(filepath.Join(others, host), pausedStatus(name, fmt.Sprintf("%d1111111-1111-4111-8111-111111111111", i), time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.Stop)
		checkpoints(t, f, 100*time.Millisecond, func(n uint64) int64 { return int64(n * n * 31 % 171) })
		all = append(all, f)
	}
	return all
}

// Hosts beside each other: one that answers, one with a problem, one that comes later.
func TestFleetOnTheScreen(t *testing.T) {
	others := shimsIn(t)
	standInForSSH(t, others)
	hostWith(t, others, "node1", "db1", "web1")
	hostWith(t, others, "node2", "mail", "web1")[0].Say(func(s *control.Status) {
		s.State, s.Why = control.Uncorrected, "reaching into QEMU: not permitted to trace"
	})
	const command = "ftclock -c qemu+ssh://root@node1/system -c qemu+ssh://root@node2/system -c qemu+ssh://root@node3/system "
	own := shimsIn(t) // of this host, which isn't asked for
	term := openTerminal(t, own, 100, 24, "C.UTF-8", command+"watch")
	screen := term.until(`^ftclock watch   4 domains on 3 hosts, 2 with a problem`, `^  HOST   DOMAIN  STATE `, `^▸ node1  db1     correcting +[1-9]\d?\.\d .*[▁▂]{3}`,
		`^  node1  web1    correcting +[1-9]`, `^  node2  mail    uncorrected`, `^  node2  web1    correcting +[1-9]`, `^  node3  -       unreachable`)
	keepPicture(t, "watch-fleet.txt", screen)
	term.keys("G")
	term.until(`^▸ node3`, `^node3: ssh: connect to host node3 port 22: No route to host; `)
	term.keys("k", "Enter")
	term.until(`^host +node2$`, `^domain +web1$`, `^pauses a second +[1-9]`)
	term.keys("h", "k")
	term.until(`^node2 mail: reaching into QEMU: not permitted to trace`)

	// The third one comes up, without a domain, and the first one goes.
	if err := os.Mkdir(filepath.Join(others, "node3"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(others, "node1"), filepath.Join(others, "gone")); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(filepath.Join(others, "gone"))
	screen = term.until(`^ftclock watch   2 domains on 3 hosts, 2 with a problem`, `^  node1  -       unreachable`)
	if strings.Contains(screen, "db1") || strings.Contains(screen, "node3") {
		t.Errorf("what isn't there is shown:\n%s", screen)
	}
	term.keys("q")
	term.until(`^ended with 0$`)

	if err := os.Rename(filepath.Join(others, "gone"), filepath.Join(others, "node1")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(others, "node3")); err != nil {
		t.Fatal(err)
	}
	term = openTerminal(t, t.TempDir(), 100, 24, "C.UTF-8", "SHIMS="+own+" "+command+"status")
	screen = term.until(`^HOST +DOMAIN +STATE`, `^node1  db1 `, `^ftclock: error: asking node3: `, `^ended with 3$`)
	keepPicture(t, "status-fleet.txt", strings.ReplaceAll(screen, "ended with 3", ""))
}
