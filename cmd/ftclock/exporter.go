package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/sync/errgroup"

	"ftclock/cmd/ftclock/internal/ui"
)

type exporterCmd struct {
	Listen     []string `name:"web.listen-address" sep:"none" default:"127.0.0.1:9989" placeholder:"ADDRESS:PORT" help:"Where to answer; may be given more than once. Default: 127.0.0.1:9989, loopback alone."`
	Activated  bool     `name:"web.systemd-socket" help:"Answer on the sockets that systemd hands over, those of ftclock-exporter.socket, and listen nowhere else."`
	ConfigFile string   `name:"web.config.file" placeholder:"FILE" help:"TLS and passwords, in the form of Prometheus' exporter-toolkit. A change takes effect at the next connection."`
}

func (exporterCmd) Help() string {
	return "Serves /metrics for Prometheus, with the state of each domain's clock on this host. monitoring.md in share/doc/ftclock " +
		"lists the metrics. Run it as root. It doesn't need libvirt."
}

func (c *exporterCmd) Run(p *program) error {
	if err := web.Validate(c.ConfigFile); err != nil {
		return ui.Hinted(fmt.Errorf("reading %s: %w", c.ConfigFile, err), "monitoring.md in share/doc/ftclock has an example")
	}
	listeners, err := c.listeners()
	if err != nil {
		return err
	}
	for _, l := range listeners {
		a, ok := l.Addr().(*net.TCPAddr)
		if ok && !a.IP.IsLoopback() && c.ConfigFile == "" {
			p.Warn("%s can be reached from other hosts, and there is no password: set one with --web.config.file, or make sure that only Prometheus can reach it", a)
		}
	}
	if os.Geteuid() != 0 {
		p.Warn("only root may ask the shims, so there will be no domain in the metrics; run it as root")
	}
	return c.serve(p, listeners)
}

// listeners gives what to answer on.
func (c *exporterCmd) listeners() ([]net.Listener, error) {
	if c.Activated {
		listeners, err := activation.Listeners()
		listeners = slices.DeleteFunc(listeners, func(l net.Listener) bool { return l == nil })
		if err == nil && len(listeners) == 0 {
			err = errors.New("there is none")
		}
		if err != nil {
			return nil, ui.Hinted(fmt.Errorf("taking the sockets from systemd: %w", err),
				"`systemctl start ftclock-exporter.socket` listens for it; without systemd leave --web.systemd-socket out")
		}
		return listeners, nil
	}
	var listeners []net.Listener
	for _, address := range c.Listen {
		l, err := net.Listen("tcp", address)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, ui.Hinted(fmt.Errorf("listening for Prometheus: %w", err), "give a free port with --web.listen-address ADDRESS:PORT")
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// serve answers on all listeners until the operator interrupts, or one of them fails. Each has a server of its own: the toolkit changes
// that.
func (c *exporterCmd) serve(p *program, listeners []net.Listener) error {
	handler, logger := c.handler(p), slog.New(warnings{p.UI})
	group, ctx := errgroup.WithContext(p.ctx)
	for _, l := range listeners {
		server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
			ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelWarn)}
		stop := context.AfterFunc(ctx, func() {
			last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_ = server.Shutdown(last)
		})
		defer stop()
		if c.ConfigFile == "" {
			p.Printf("serving http://%s/metrics\n", l.Addr())
		} else {
			p.Printf("serving %s/metrics as %s says\n", l.Addr(), c.ConfigFile)
		}
		group.Go(func() error {
			if err := web.Serve(l, server, &web.FlagConfig{WebConfigFile: &c.ConfigFile}, logger); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving metrics: %w", err)
			}
			return nil
		})
	}
	return group.Wait()
}

// handler answers requests.
func (c *exporterCmd) handler(p *program) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{dirs: p.dirs}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, Registry: registry, MaxRequestsInFlight: 4,
	}))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, `<!DOCTYPE html><title>ftclock</title><p><a href="/metrics">metrics</a> of the guests' clocks`)
	})
	return mux
}

// warnings has the server's and the toolkit's warnings printed as ours are, and nothing less.
type warnings struct{ *ui.UI }

// Enabled is slog.Handler's.
func (warnings) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

// Handle is slog.Handler's.
func (w warnings) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += fmt.Sprintf(", %s: %s", a.Key, a.Value)
		return true
	})
	w.Warn("%s", text)
	return nil
}

// WithAttrs is slog.Handler's; nobody has any.
func (w warnings) WithAttrs([]slog.Attr) slog.Handler { return w }

// WithGroup is slog.Handler's; nobody has any.
func (w warnings) WithGroup(string) slog.Handler { return w }
