package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"
	"ftclock/xml-templates"
)

// While two domains are under a long job of libvirt's, which lets nobody change their metadata, the anchors of those behind them
// in the alphabet are published as ever, and nothing is complained of. Theirs are published once the job has ended.
func TestKVMAnchorsBesideLongJobs(t *testing.T) {
	if os.Getenv("FTCLOCK_LONG") != "1" {
		t.Skip("it takes minutes: make anchors")
	}
	second, there := secondHost(t)
	ballast := filepath.Join(privatelibvirt.Dir, "ballast-of-minutes")
	content := make([]byte, 180<<20) // at 1 MiB/s
	for i := range content {
		content[i] = byte(i/4096) | 1
	}
	if err := os.WriteFile(ballast, content, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(ballast) })
	t.Cleanup(func() { nothingLeft(t) })
	busy := []string{"a-moving", "b-moving"}
	all := []string{"a-moving", "b-moving", "c-behind"}
	for _, name := range all {
		x := managed(name, clockElement)
		if name != "c-behind" {
			x.OS.Initrd, x.Memory.Value = ballast, 320
		}
		d, _ := domaintest.Start(t, conn, x)
		endsThere(t, there, name)
		pause(t, d, 5*time.Millisecond)
	}
	ftclock(t, "anchor", "publish")
	published := func(name string) uint64 {
		t.Helper()
		text, err := virsh("metadata", name, metadata.AnchorNamespace)
		if err != nil {
			t.Fatalf("%s has no anchor: %v\n%s", name, err, text)
		}
		a, err := metadata.ParseAnchor([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return a.Real
	}
	before := map[string]uint64{}
	for _, name := range all {
		before[name] = published(name)
	}

	migrate := func(n int, do func()) {
		t.Helper()
		out, err := midMigration(t, []string{"migrate", busy[n], second.URI, "--live", "--bandwidth", "1",
			"--migrateuri", "tcp://" + privatelibvirt.SecondAddress}, do)
		if err == nil {
			t.Errorf("the migration of %s ended before it was to:\n%s", busy[n], out)
		}
	}
	migrate(0, func() {
		migrate(1, func() {
			if out := ftclock(t, "anchor", "publish"); strings.TrimSpace(out) != "" {
				t.Errorf("beside long jobs it says: %s", out)
			}
			for _, name := range busy {
				if info, err := virsh("domjobinfo", name); err != nil || !strings.Contains(info, "Data processed") {
					t.Errorf("the migration of %s has ended: %v\n%s", name, err, info)
				}
			}
			if now := published("c-behind"); now <= before["c-behind"] {
				t.Errorf("the anchor behind them is of %d, as before them", now)
			}
			for _, name := range busy {
				mustVirsh(t, "domjobabort", name)
			}
		})
	})
	ftclock(t, "anchor", "publish")
	for _, name := range all {
		if now := published(name); now <= before[name] {
			t.Errorf("the anchor of %s is of %d, as before its job", name, now)
		}
	}
}
