package systemd

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/container"
)

// A host that is shut down ends its domains itself: libvirt-guests, or systemd where that isn't used. The shim ends after
// its QEMU, and isn't ended.
func TestKVMHostShutdown(t *testing.T) {
	for way, c := range map[string]struct {
		prepare func(*host)
		ends    string // what ends QEMU
		saved   bool
	}{
		"by libvirt-guests": {
			prepare: func(h *host) {
				check.NoError(h.t, os.WriteFile(h.Path("/etc/default/libvirt-guests"), []byte("ON_SHUTDOWN=suspend\n"), 0o644))
				h.must("systemctl", "restart", "libvirt-guests")
			},
			ends: "Stopping libvirt-guests.service", saved: true,
		},
		"by systemd": {
			prepare: func(h *host) { h.must("systemctl", "mask", "--now", "libvirt-guests") },
			ends:    `Stopping machine-qemu\x2d1\x2dweb1.scope`,
		},
	} {
		t.Run(way, func(t *testing.T) {
			journal, stops, logs := t.TempDir(), t.TempDir(), t.TempDir()
			h := boot(t, clockElement, container.Options{Binds: map[string]string{
				journal: "/var/log/journal", stops: "/var/lib/ftclock", logs: "/var/log/libvirt",
			}})
			c.prepare(h)
			h.must("virsh", "start", name)
			h.inUnit()
			h.clock()
			check.NoError(t, h.PowerOff(2*patience))
			lines := readJournal(t, journal)
			at := -1
			for _, step := range []string{c.ends, "QEMU has ended", unit + ": Deactivated successfully", "Reached target poweroff.target"} {
				found := -1
				for i, line := range lines {
					if i > at && strings.Contains(line, step) {
						found = i
						break
					}
				}
				if found < 0 {
					t.Fatalf("%q doesn't come in its place; the journal:\n%s", step, strings.Join(lines, "\n"))
				}
				at = found
				t.Log(lines[found])
			}
			for _, line := range lines {
				if strings.Contains(line, "Stopping "+unit) || strings.Contains(line, "not ending") || strings.Contains(line, "died") {
					t.Errorf("something ended the shim: %s", line)
				}
			}
			log := check.Value(os.ReadFile(filepath.Join(logs, "qemu", name+".log")))(t)
			// QEMU's last word, if virtlogd was still there for it: what ended it.
			if at := bytes.Index(log, []byte("terminating on signal")); at >= 0 {
				t.Logf("QEMU: %s", bytes.SplitN(log[at:], []byte("\n"), 2)[0])
			}
			if bytes.Contains(log, []byte("crashed")) {
				t.Errorf("libvirt takes QEMU for crashed:\n%s", log)
			}
			if _, err := os.Stat(filepath.Join(stops, uuid+".json")); c.saved && err != nil {
				t.Errorf("the saved guest's reading: %v", err)
			}
		})
	}
}

// readJournal gives the lines of the newest boot, oldest first.
func readJournal(t *testing.T, dir string) (lines []string) {
	t.Helper()
	out := check.Value(exec.Command("journalctl", "-D", dir, "-b", "0", "-o", "json", "--no-pager").Output())(t)
	all := bufio.NewScanner(bytes.NewReader(out))
	all.Buffer(nil, 1<<20)
	for all.Scan() {
		var entry struct {
			From    string `json:"SYSLOG_IDENTIFIER"`
			Message any    `json:"MESSAGE"`
		}
		check.NoError(t, json.Unmarshal(all.Bytes(), &entry))
		text, _ := entry.Message.(string)
		lines = append(lines, entry.From+": "+text)
	}
	check.NoError(t, all.Err())
	return lines
}
