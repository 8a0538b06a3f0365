package main

import (
	"encoding/json"
	"math"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
	"ftclock/host"
)

// served is a process that a fake shim serves as the node service has a shim serve a QEMU: it has no UUID of libvirt's.
func served(t *testing.T) (s control.Status, end func()) {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		stdin.Close()
		_ = cmd.Wait()
	}
	t.Cleanup(end)
	stat, err := host.ReadStat(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	s = servedStatus()
	s.Name, s.UUID, s.QEMU, s.Mode = "payments_db", host.ProcessUUID(cmd.Process.Pid, stat.Started), cmd.Process.Pid, control.Watch
	s.Clock, s.Policy = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`, "/etc/ftclock/policy.d/10-pods.xml"
	return s, end
}

// shows runs ftclock status, of which libvirt knows nothing of the QEMU.
func shows(t *testing.T, code int, args []string, want ...string) string {
	t.Helper()
	stdout, stderr, got := told(append([]string{"status"}, args...)...)
	if got != code || stderr != "" {
		t.Errorf("status %q: exit code %d, want %d: %s", args, got, code, stderr)
	}
	for _, w := range want {
		if !regexp.MustCompile("(?m)" + w).MatchString(stdout) {
			t.Errorf("status %q: no %q in\n%s", args, w, stdout)
		}
	}
	return stdout
}

// nodeMetrics are the metrics of a QEMU that the node service serves, without its labels.
func nodeMetrics(t *testing.T, s control.Status) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(&collector{dirs: status.HostDirs})
	all := map[string]float64{}
	for name, v := range gathered(t, registry) {
		if strings.Contains(name, "domain="+s.Name) && strings.Contains(name, "uuid="+s.UUID) {
			all[strings.NewReplacer("domain="+s.Name, "", "uuid="+s.UUID, "", ",", "").Replace(name)] = v
		}
	}
	return all
}

// What the node service serves is in status and in the metrics, from its start to its end, whatever libvirt knows.
func TestServedByTheNode(t *testing.T) {
	holdMock(t)
	status.HostDirs.Shims = shimsIn(t)
	s, end := served(t)
	f, err := fakeshim.Start(status.HostDirs.Shims, s)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()

	shows(t, 0, nil, `^payments_db +correcting +ptrace +1000 `)
	shows(t, 0, []string{s.Name}, `^uuid +`+s.UUID+`$`, `^mode +watch: beside QEMU$`, `^guest's clock +kvmclock is on$`,
		`^policy +<ftclock:clock .*/>; the host's, from /etc/ftclock/policy.d/10-pods.xml$`, `^processes +QEMU `+strconv.Itoa(s.QEMU)+`, `)
	var all []struct {
		Hostname string `json:"hostname"`
		control.Status
	}
	text := shows(t, 0, []string{"--format", "json"})
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	if one := all[0]; one.Hostname == "" || one.Name != s.Name || one.UUID != s.UUID || one.QEMU != s.QEMU || one.State != control.Correcting ||
		one.Mode != control.Watch || one.Policy != s.Policy || one.Pauses != 1000 || one.Dropped != 980 || one.GuestClock != control.KVMClock || one.Kept == nil {
		t.Errorf("%+v", one)
	}
	metrics := nodeMetrics(t, s)
	for name, want := range map[string]float64{
		"ftclock_domain_uncorrected{}": 0, "ftclock_domain_state{state=correcting}": 1, "ftclock_pauses_total{decision=dropped}": 980,
		"ftclock_guest_clock{clock=kvmclock}": 1, "ftclock_last_residual_seconds{}": -3e-9, "ftclock_recorded_pauses_total{}": 988,
		"ftclock_domain_info{method=ptracemode=watchversion=fake 1}": 1,
	} {
		if v, ok := metrics[name]; !ok || math.Abs(v-want) > 1e-12*math.Abs(want) {
			t.Errorf("%s is %v (%t), want %v", name, v, ok, want)
		}
	}

	// Its correction is off, and who asks is told how it is switched on.
	f.Say(func(s *control.Status) { s.State, s.Clock = control.Watching, "" })
	attach := "`ftclock attach " + strconv.Itoa(s.QEMU) + "`"
	shows(t, 1, nil, `^payments_db: its clock is left to QEMU, .*`+attach)

	// Its shim is killed, and it runs on: a problem, though libvirt knows no such domain. When it has ended, too, it is none.
	f.Kill()
	shows(t, 1, nil, `^payments_db +gone `, `^payments_db: its shim was killed or crashed, .*; `+attach+` gives it one$`)
	if metrics := nodeMetrics(t, s); metrics["ftclock_domain_uncorrected{}"] != 1 || metrics["ftclock_domain_state{state=gone}"] != 1 {
		t.Errorf("without its shim: %v", metrics)
	}
	end()
	shows(t, 0, nil, `^payments_db +off `)
	if metrics := nodeMetrics(t, s); len(metrics) > 0 {
		t.Errorf("after its end: %v", metrics)
	}
}
