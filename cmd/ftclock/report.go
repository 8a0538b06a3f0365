package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/record"
	"ftclock/report"
)

type reportCmd struct {
	Domain string `arg:"" predictor:"domain" help:"Name, UUID or id. The domain needn't run or be defined any more."`
	Since  string `placeholder:"TIME" help:"From this time on: 2026-11-23, 2026-11-23T09:30 or with seconds, in UTC or with an offset (+01:00); or 36h, 7d for that long ago. Default: the record's beginning."`
	Until  string `placeholder:"TIME" help:"Up to this time, in the same forms. Default: now."`
	Format string `enum:"html,json,csv" default:"html" placeholder:"html|json|csv" help:"html: a page to read and print; json or csv: for other programs."`
	Output string `short:"o" type:"path" placeholder:"FILE" help:"Write to this file. Default: standard output."`
}

func (reportCmd) Help() string {
	return "Reports from the record on disk how a domain's clock was kept: drift with and without ftclock, distance from the reference, pauses, gaps, and the " +
		"statement that RTS 25 requires. Exit code 1: part of the record couldn't be read; the report says which."
}

func (c *reportCmd) Run(p *program) error {
	o, err := c.options(time.Now())
	if err != nil {
		return err
	}
	if c.Output == "" && c.Format == "html" && ui.IsTerminal(p.Stdout) {
		return ui.Hinted(errors.New("a page in HTML can't be shown on a terminal"), "--output FILE.html writes it to a file, --format csv prints a table")
	}
	uuid, err := c.find(p)
	if err != nil {
		return err
	}
	// A status request makes the shim write its record to disk.
	_, asked := p.dirs.Status(uuid, 0)
	o.Alive = asked == nil
	if asked != nil && !status.NoShim(asked) && !errors.Is(asked, os.ErrPermission) {
		p.Warn("%s; the last minute may be missing in the report, `ftclock status %s` says more", ui.ErrorText(asked), ui.ShellWord(c.Domain))
		o.Alive = true
	}
	r, err := record.Read(p.dirs.Records, uuid, o.From, o.To)
	if err != nil {
		return c.explain(err)
	}
	if r.Begin.IsZero() {
		return ui.Hinted(fmt.Errorf("nothing in the record of %s can be read: %s", c.Domain, r.Problems[0]), "nothing was changed in it")
	}
	if !r.Begin.Before(o.To) {
		return ui.Hinted(fmt.Errorf("the record of %s begins at %s, after that time", c.Domain, r.Begin.UTC().Format(time.RFC3339)), "give a later --until")
	}
	o.Host, _ = os.Hostname()
	if err := c.write(p, report.New(r, o)); err != nil {
		return err
	}
	for _, problem := range r.Problems {
		p.Warn("%s", problem)
	}
	if len(r.Problems) > 0 {
		p.Hint("the report shows what couldn't be read as gaps; a backup of %s may have it", record.Path(p.dirs.Records, uuid))
		return ui.ErrProblem
	}
	return nil
}

// options are those of the report, with the span of time in whole minutes.
func (c *reportCmd) options(now time.Time) (o report.Options, err error) {
	o.Made, o.Version = now, programVersion()
	if o.From, err = moment(c.Since, now, "--since"); err != nil {
		return o, err
	}
	if o.To, err = moment(c.Until, now, "--until"); err != nil {
		return o, err
	}
	if !o.From.IsZero() {
		o.From = o.From.UTC().Truncate(time.Minute)
	}
	if down := o.To.UTC().Truncate(time.Minute); !down.Equal(o.To) {
		o.To = down.Add(time.Minute)
	}
	if o.To.IsZero() || o.To.After(now) {
		o.To = now
	}
	if !o.From.IsZero() && !o.From.Before(o.To) {
		return o, ui.Hinted(fmt.Errorf("there is no time between --since %s and %s", o.From.Format(time.RFC3339), o.To.UTC().Format(time.RFC3339)),
			"times without an offset are UTC")
	}
	return o, nil
}

// moment parses a time, absolute or relative to now; empty is zero.
func moment(text string, now time.Time, flag string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	for _, form := range []string{time.RFC3339, "2006-01-02T15:04Z07:00", "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02 15:04:05", "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(form, text, time.UTC); err == nil {
			return t, nil
		}
	}
	ago, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(days, 10, 15)
		ago = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || ago < 0 {
		return time.Time{}, ui.Hinted(fmt.Errorf("%s %q isn't a time", flag, text), "2026-11-23, 2026-11-23T09:30, 2026-11-23T09:30:00+01:00, or 36h, 7d for that long ago")
	}
	return now.Add(-ago), nil
}

// find gives the UUID of the domain's record: by libvirt for a domain that is defined, by the records for one that was.
func (c *reportCmd) find(p *program) (string, error) {
	records := p.dirs.Records
	all, err := record.Domains(records)
	if err != nil {
		return "", c.explain(err)
	}
	has := map[string]bool{}
	for _, uuid := range all {
		has[uuid] = true
	}
	if uuid := strings.ToLower(c.Domain); has[uuid] {
		return uuid, nil
	}
	h, refused := hypervisor.Connect(p.uri())
	if refused == nil {
		defer h.Close()
		if d, err := h.Find(c.Domain); err == nil {
			defer d.Close()
			if !has[d.UUID] {
				return "", c.explain(fmt.Errorf("reading the record of %s: %w", d.Name, record.ErrNone))
			}
			return d.UUID, nil
		}
	}
	var named []string
	for _, uuid := range all {
		if record.Name(records, uuid) == c.Domain {
			named = append(named, uuid)
		}
	}
	switch len(named) {
	case 1:
		return named[0], nil
	case 0:
		if refused != nil {
			return "", ui.Hinted(fmt.Errorf("no record is of a domain %q, and libvirt can't be asked for its UUID: %w", c.Domain, refused), "`ls "+records+"` shows the UUIDs that have a record")
		}
		return "", ui.Hinted(fmt.Errorf("no domain %q, and no record of one", c.Domain), "`virsh list --all` shows the domains, `ls "+records+"` the UUIDs that have a record")
	}
	return "", ui.Hinted(fmt.Errorf("%d domains had the name %q: %s", len(named), c.Domain, strings.Join(named, ", ")), "give the UUID")
}

// explain adds a hint to an error of package record.
func (c *reportCmd) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return ui.Hinted(err, "run it as root")
	case errors.Is(err, record.ErrNone):
		return ui.Hinted(err, "a record begins when the domain is first started with ftclock: `ftclock enable "+ui.ShellWord(c.Domain)+"`")
	}
	return err
}

func (c *reportCmd) write(p *program, r *report.Report) error {
	to := func(w io.Writer) error {
		out := bufio.NewWriter(w)
		if err := c.encode(out, r); err != nil {
			return err
		}
		return out.Flush()
	}
	if c.Output == "" {
		if err := to(p.Stdout); err != nil {
			return fmt.Errorf("writing the report: %w", err)
		}
		return nil
	}
	if err := replaceFile(c.Output, to); err != nil {
		return ui.Hinted(fmt.Errorf("writing the report: %w", err), "--output takes another place")
	}
	return nil
}

func (c *reportCmd) encode(w io.Writer, r *report.Report) error {
	switch c.Format {
	case "json":
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", " ")
		return encoder.Encode(r)
	case "csv":
		return r.WriteCSV(w)
	}
	return r.WriteHTML(w)
}

// replaceFile writes a file as a whole or not at all. A device or a pipe, such as /dev/stdout, is written to directly.
func replaceFile(name string, write func(io.Writer) error) (err error) {
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if err := errors.Join(write(f), f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
