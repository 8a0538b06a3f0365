package node

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/policy"
	"ftclock/test/check"
)

// inStatus is what `ftclock status` says of a QEMU, whose exit code must be code. No libvirt is there, and it says that it isn't.
func inStatus(t *testing.T, q *qemu, code int) control.Status {
	t.Helper()
	cmd := exec.Command(binary(t), "status", "--format", "json")
	var warnings bytes.Buffer
	cmd.Stderr = &warnings
	out, err := cmd.Output()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != code {
		t.Errorf("status ends with %v, want the exit code %d\n%s%s", err, code, out, warnings.String())
	}
	if !strings.Contains(warnings.String(), "only domains with a shim are shown") || strings.Contains(warnings.String(), "ftclock: error:") {
		t.Errorf("status warns of %q", warnings.String())
	}
	var all []control.Status
	check.NoError(t, json.Unmarshal(out, &all))
	for _, s := range all {
		if s.UUID == q.id() {
			return s
		}
	}
	t.Fatalf("%s isn't in the status:\n%s", q.name, out)
	return control.Status{}
}

// inMetrics are the exporter's metrics of a QEMU, by their lines without its name and UUID.
func inMetrics(t *testing.T, q *qemu) map[string]float64 {
	t.Helper()
	cmd := exec.Command(binary(t), "exporter", "--web.listen-address", "127.0.0.1:0")
	stdout := check.Value(cmd.StdoutPipe())(t)
	check.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	first := check.Value(bufio.NewReader(stdout).ReadString('\n'))(t)
	answer := check.Value(http.Get(regexp.MustCompile(`http://\S+`).FindString(first)))(t)
	defer answer.Body.Close()
	page := check.Value(io.ReadAll(answer.Body))(t)
	all, labels := map[string]float64{}, strings.NewReplacer(`domain="`+q.name+`",`, "", `,uuid="`+q.id()+`"`, "", `uuid="`+q.id()+`"`, "")
	for line := range strings.Lines(string(page)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if strings.Contains(name, `domain="`+q.name+`"`) && strings.Contains(name, `uuid="`+q.id()+`"`) {
			all[strings.TrimSuffix(labels.Replace(name), ",")+"}"] = check.Value(strconv.ParseFloat(value, 64))(t)
		}
	}
	return all
}

// shown checks that status and the metrics tell of a QEMU that the service has served for so many pauses.
func shown(t *testing.T, q *qemu, pauses uint64) {
	t.Helper()
	s := inStatus(t, q, 0)
	if s.Name != q.name || s.QEMU != q.pid || s.State != control.Correcting || s.Mode != control.Watch || s.GuestClock != control.KVMClock ||
		s.Policy != policy.Dir+"/a.xml" || s.Pauses != pauses || s.Dropped+s.Anchored != pauses || s.Anchor.Valid != 1 || s.Kept == nil {
		t.Errorf("status: %+v", s)
	}
	metrics := inMetrics(t, q)
	for name, want := range map[string]float64{
		`ftclock_domain_uncorrected{}`: 0, `ftclock_domain_state{state="correcting"}`: 1, `ftclock_guest_clock{clock="kvmclock"}`: 1,
		`ftclock_pauses_total{decision="dropped"}`: float64(s.Dropped), `ftclock_disagreements_total{}`: 0, `ftclock_record_writable{}`: 1,
	} {
		if v, ok := metrics[name]; !ok || v != want {
			t.Errorf("the exporter has %s %v (%t), want %v", name, v, ok, want)
		}
	}
	if v := metrics[`ftclock_caught_up_seconds_total{}`]; v < float64(pauses)*0.001 {
		t.Errorf("the exporter has %v s caught up in %d pauses", v, pauses)
	}
}

// shownLost checks that they tell of one that runs and has lost its shim.
func shownLost(t *testing.T, q *qemu) {
	t.Helper()
	s := inStatus(t, q, 1)
	if s.State != "gone" || !strings.Contains(s.Why, "the module in QEMU follows the last policy; `ftclock attach "+strconv.Itoa(q.pid)+"` gives it one") {
		t.Errorf("status: %+v", s)
	}
	if v := inMetrics(t, q)[`ftclock_domain_uncorrected{}`]; v != 1 {
		t.Errorf("the exporter has uncorrected %v", v)
	}
}
