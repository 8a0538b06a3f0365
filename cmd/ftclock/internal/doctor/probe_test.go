package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ftclock/cmd/ftclock/internal/engine"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// What the probe sees is worded by who has to do something: ftclock, libvirt's daemon, or the host.
func TestJudgeProbe(t *testing.T) {
	for _, c := range []struct{ message, what string }{
		{"Hook script execution failed: internal error: Child process (/etc/libvirt/hooks/qemu.d/50-ftclock ftclock-probe start begin -) " +
			"unexpected exit status 1: ftclock: starting domain ftclock-probe: no such luck",
			"a probe domain on /q can't be served: starting domain ftclock-probe: no such luck"},
		{"Hook script execution failed: cannot execute binary /etc/libvirt/hooks/qemu.d/50-ftclock: Permission denied", "libvirt can't run the hook: "},
		{"internal error: process exited while connecting to monitor", "libvirt can't start a domain with KVM on /q: "},
	} {
		wantFinding(t, judgeProbeStart("/q", errors.New(c.message)), bad, c.what)
	}
	wantFinding(t, judgeProbe("/q", nil, fmt.Errorf("asking: %w", os.ErrNotExist)), bad, "libvirt doesn't call the hook")
	wantFinding(t, judgeProbe("/q", nil, control.ErrGone), bad, "on /q: its shim doesn't answer")
	wantFinding(t, judgeProbe("/q", &control.Status{State: control.Uncorrected, Why: "no slot"}, nil), bad, "isn't corrected (uncorrected): no slot")
	wantFinding(t, judgePauses(engine.Verdict{Pauses: 2, Lost: 40e6, Off: 12}), good, "its clock held: +12 ns off after 2 pauses of 40.0 ms in all")
	wantFinding(t, judgePauses(engine.Verdict{Fails: true, Why: "passed: unstable"}), bad, "doesn't hold: passed: unstable")
	wantFinding(t, judgePauses(engine.Verdict{Why: "the module recorded 0 pauses"}), bad, "recorded 0 pauses")
}

// The probe's metadata is that of a managed domain which may not run uncorrected.
func TestProbeXML(t *testing.T) {
	text, err := probeXML("/q").Marshal()
	if err != nil {
		t.Fatal(err)
	}
	d, err := metadata.Parse([]byte(text))
	if err != nil || d.Policy == nil || !d.Policy.Required || d.Name != ProbeName || d.UUID != probeUUID {
		t.Errorf("got %+v, %v of\n%s", d, err, text)
	}
}

func TestRemoveProbeFiles(t *testing.T) {
	records := t.TempDir()
	p := prober{dirs: status.Dirs{Records: records}}
	if err := record.SetManaged(records, probeUUID, true); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(records, probeUUID+".json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing
		if err := p.removeFiles(); err != nil {
			t.Error(err)
		}
		if left, _ := os.ReadDir(records); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
