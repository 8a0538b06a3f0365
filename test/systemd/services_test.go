package systemd

import (
	"strings"
	"testing"
	"time"

	"ftclock/test/container"
	metadata "ftclock/xml-templates"
)

// Beside the shims a host has the exporter and what publishes the anchors. Both do their work for a running domain.
func TestKVMTheHostsServices(t *testing.T) {
	h := boot(t, clockElement, container.Options{})
	if out := h.must("sh", "-c", "systemd-analyze verify --man=no /usr/lib/systemd/system/ftclock-*"); out != "" {
		t.Errorf("the units: %s", out)
	}
	h.must("virsh", "start", name)
	h.inUnit()
	h.clock()
	h.checkpoints(20)()
	t.Run("exporter", func(t *testing.T) { (&host{h.Container, t}).exporter() })
	t.Run("anchor", func(t *testing.T) { (&host{h.Container, t}).anchor() })
	h.must("virsh", "destroy", name)
	h.nothingLeft()
}

// exporter checks that the exporter's unit answers with the domain's metrics, and that its sandbox is there.
func (h *host) exporter() {
	const service, socket = "ftclock-exporter.service", "ftclock-exporter.socket"
	h.must("systemctl", "enable", "--now", service)
	const scrape = `exec 3<>/dev/tcp/127.0.0.1/9989 && printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3 && cat <&3`
	var metrics string
	h.eventually("metrics", func() bool {
		var err error
		metrics, err = h.Run("bash", "-c", scrape)
		return err == nil
	})
	const domain, id = `domain="` + name + `"`, `uuid="` + uuid + `"`
	for _, line := range []string{
		"HTTP/1.0 200 OK", "ftclock_shims 1", "ftclock_shims_readable 1", "ftclock_host_clock_synchronised ", // adjtimex is allowed
		"ftclock_domain_state{" + domain + `,state="correcting",` + id + "} 1",
		"ftclock_domain_uncorrected{" + domain + "," + id + "} 0",
		"ftclock_recorded_pauses_total{" + domain + "," + id + "} 21", // and the start
		"ftclock_record_writable{" + domain + "," + id + "} 1",
	} {
		if !strings.Contains(metrics, "\n"+line) && !strings.HasPrefix(metrics, line) {
			h.t.Errorf("no line %q in:\n%s", line, metrics)
		}
	}

	pid := strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", "MainPID", service))
	h.confined(pid, 0)
	h.readOnly(pid, "/run", "/run/ftclock", "/var/lib/ftclock", "/etc", "/usr")
	for _, dir := range []string{"/var/lib/libvirt", "/etc/libvirt", "/root", "/dev/kvm"} {
		if out, _ := h.Run("nsenter", "-t", pid, "-m", "ls", "-A", dir); out != "" && !strings.Contains(out, "No such file") {
			h.t.Errorf("the exporter sees %s: %s", dir, out)
		}
	}
	if out := h.must("journalctl", "-u", service, "-p", "warning", "--no-pager", "-q", "-o", "cat"); out != "" {
		h.t.Errorf("warnings: %s", out)
	}
	h.t.Logf("%s", h.must("sh", "-c", "systemd-analyze security --no-pager "+service+" | tail -n 1"))
	h.must("systemctl", "disable", "--now", service, socket)
	if result := strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", "Result", service)); result != "success" {
		h.t.Errorf("stopped: %s", result)
	}
}

// anchor checks that the anchor's service puts one into the live metadata, and the timer newer ones.
func (h *host) anchor() {
	const service, timer = "ftclock-anchor.service", "ftclock-anchor.timer"
	published := func() string {
		out, err := h.Run("virsh", "-q", "metadata", name, metadata.AnchorNamespace)
		if err != nil { // there is none; newer versions of virsh print nothing
			return ""
		}
		return strings.TrimSpace(out)
	}
	if out := published(); out != "" {
		h.t.Errorf("there is an anchor already: %s", out)
	}
	before := time.Now()
	h.must("systemctl", "start", service)
	first := published()
	a, err := metadata.ParseAnchor([]byte(first))
	if err != nil || time.Unix(0, int64(a.Real)).Before(before) {
		h.t.Errorf("the anchor, asked for at %v: %v\n%s", before, err, first)
	}
	h.must("systemctl", "enable", "--now", timer)
	h.must("systemctl", "is-enabled", timer)
	h.must("systemctl", "is-active", timer)
	if out := h.must("systemctl", "list-timers", "--no-legend", "--no-pager"); !strings.Contains(out, timer) {
		h.t.Errorf("timers:\n%s", out)
	}
	h.eventually("the timer's anchor", func() bool {
		next := published()
		return next != "" && next != first
	})
	h.eventually("the timer's next time", func() bool {
		next := strings.TrimSpace(h.must("systemctl", "show", "--value", "-p", "NextElapseUSecMonotonic", timer))
		return next != "" && next != "infinity"
	})
	if out := h.must("journalctl", "-u", service, "-p", "warning", "--no-pager", "-q", "-o", "cat"); out != "" {
		h.t.Errorf("warnings: %s", out)
	}
	h.must("systemctl", "disable", "--now", timer)
}
