package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/test/check"
)

// The number of series is bounded by the number of domains, and the page says by how much.
func TestSeries(t *testing.T) {
	const domains = 1000
	var all []control.Status
	for i := range domains {
		s := servedStatus()
		s.Name, s.UUID = fmt.Sprintf("web%d", i), fmt.Sprintf("%08d-1111-4111-8111-111111111111", i)
		if i%2 == 1 { // with values that nobody knows
			s.State, s.GuestClock, s.Method = "odd", "odd", "odd"
		}
		all = append(all, s)
	}
	count := func(statuses ...control.Status) int {
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(&collector{dirs: status.Dirs{Shims: shimsIn(t, statuses...)}})
		return len(gathered(t, registry))
	}
	host := count()
	each := count(all[0]) - host
	if got := count(all...); got != host+domains*each {
		t.Errorf("%d domains have %d series, one has %d", domains, got-host, each)
	}
	page, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("A domain has %d series at most", each); !strings.Contains(string(page), want) || !strings.Contains(string(page), fmt.Sprintf("are %d,000 series", each)) {
		t.Errorf("docs/monitoring.md doesn't say %q", want)
	}
	own := 0
	for line := range strings.Lines(scrape(t, shimsIn(t))) {
		if !strings.HasPrefix(line, "#") {
			own++
		}
	}
	if own >= 100 {
		t.Errorf("the host has %d series of its own", own)
	}
	t.Logf("%d series of the host, %d of each domain", own, each)
}

func TestExporterRefuses(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "web.yml")
	if err := os.WriteFile(junk, []byte("basic_auth_user: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args       []string
		said, hint string
	}{
		{[]string{"--web.listen-address", "127.0.0.1:99999"}, "listening for Prometheus", "--web.listen-address"},
		{[]string{"--web.listen-address", "127.0.0.1:0", "--web.listen-address", "127.0.0.1:99999"}, "listening for Prometheus", "--web.listen-address"},
		{[]string{"--web.systemd-socket"}, "taking the sockets from systemd: there is none", "systemctl start ftclock-exporter.socket"},
		{[]string{"--web.config.file", "/nowhere"}, "reading /nowhere: ", "monitoring.md"},
		{[]string{"--web.config.file", junk}, "field basic_auth_user not found", "monitoring.md"},
	} {
		_, stderr, code := told(append([]string{"exporter"}, test.args...)...)
		if code != ui.ExitError || !strings.Contains(stderr, test.said) || !strings.Contains(stderr, test.hint) {
			t.Error(code, stderr)
		}
	}
}

// exporting runs the exporter as a process of its own, with a socket as systemd hands it over, and gives the socket's address. end ends it, and
// compares its warnings.
func exporting(t *testing.T, shims string, args ...string) (address string, end func(warning string)) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	handed, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer handed.Close()
	// LISTEN_PID is the process's own, as sd_listen_fds(3) has it.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec ftclock exporter --web.systemd-socket "$@"`, "sh"}, args...)...)
	cmd.Env = append(os.Environ(), shimsVariable+"="+shims)
	cmd.ExtraFiles = []*os.File{handed}
	log, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return l.Addr().String(), func(warning string) {
		t.Helper()
		root := os.Geteuid() == 0 // anybody else is warned of that, too
		if root {                 // the server warns after it has answered
			check.Await(t, time.Minute, 5*time.Millisecond, func() bool { return strings.Contains(readFile(t, log.Name()), warning) }, "no %q", warning)
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		err := cmd.Wait()
		if said := readFile(t, log.Name()); err != nil || root && warning == "" && said != "" {
			t.Errorf("the exporter ended with %v and said %q, want %q", err, said, warning)
		}
	}
}

// Under systemd the exporter answers on the socket that it is handed.
func TestExporterOnASocketOfSystemd(t *testing.T) {
	address, end := exporting(t, shimsIn(t, servedStatus()))
	defer end("")
	answer, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK || !bytes.Contains(text, []byte("\nftclock_shims 1\n")) {
		t.Errorf("%s, %v\n%s", answer.Status, err, text)
	}
}

// With a configuration it answers by TLS alone, and to nobody but those with a password.
func TestExporterWithTLSAndPasswords(t *testing.T) {
	forTests := httptest.NewTLSServer(nil) // has a certificate for loopback, and a client that trusts it
	defer forTests.Close()
	pair := forTests.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string][]byte{
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}),
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		// bcrypt's hash of "a stand-in".
		"web.yml": []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n" +
			"basic_auth_users: {prometheus: '$2a$04$vP7W6.7Sf8dEeYrQUkjPEemcvBREMe0tmngnxCTt02GDEGaHF3Ysm'}\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	address, end := exporting(t, shimsIn(t, servedStatus()), "--web.config.file", filepath.Join(dir, "web.yml"))
	defer forTests.Client().CloseIdleConnections()
	ask := func(scheme, password string) int {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, scheme+"://"+address+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		if password != "" {
			request.SetBasicAuth("prometheus", password)
		}
		answer, err := forTests.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil || bytes.Contains(text, []byte("\nftclock_shims 1\n")) != (answer.StatusCode == http.StatusOK) {
			t.Errorf("%v, %s", err, text)
		}
		return answer.StatusCode
	}
	for _, test := range []struct {
		scheme, password string
		want             int
	}{{"https", "a stand-in", 200}, {"https", "another", 401}, {"https", "", 401}, {"http", "a stand-in", 400}} {
		if got := ask(test.scheme, test.password); got != test.want {
			t.Errorf("by %s with %q: %d, want %d", test.scheme, test.password, got, test.want)
		}
	}
	end("ftclock: warning: http: TLS handshake error from ")
}
