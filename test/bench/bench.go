package main

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"ftclock/test/built"
	"ftclock/test/guest"
	"ftclock/test/kvmhost"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

type options struct {
	quick                       bool
	only, page, pictures, guest string
	longest                     time.Duration // 0: as long as it takes
}

// late tells whether a section that began then has measured for long enough.
func (o *options) late(begin time.Time) bool { return o.longest > 0 && time.Since(begin) > o.longest }

// bench is a run.
type bench struct {
	options
	conn     *libvirt.Connect
	elf      string // the kvmclock guest
	booted   string // the state of one that has booted; empty: not yet
	progress io.Writer
	wrong    []string // what the clocks, or the measuring of them, did wrong
}

// unavailable is why a row can't be had on this machine. It is no failure: the page says it.
type unavailable string

func (u unavailable) Error() string { return string(u) }

// section is one part of the page. It gives Markdown.
type section struct {
	name, title string
	measure     func(*bench) (string, error)
	timed       bool // its figures are times
}

var sections = []section{
	{"drift", "Drift left after pauses", (*bench).drift, false},
	{"agent", "An agent and NTP in the guest", (*bench).agent, false},
	{"cont", "What a cont takes", (*bench).cont, true},
	{"start", "virsh start", (*bench).start, true},
	{"rates", "Checkpoints, 5 to 200 a second", (*bench).rates, false},
	{"work", "Work done in the guest", (*bench).work, true},
	{"many", "Many domains", (*bench).many, false},
	{"go", "Go benchmarks", (*bench).goBenchmarks, true},
	{"module", "The module in instructions", (*bench).instructions, false},
}

func run(o options, stdout, stderr io.Writer) error {
	b := &bench{options: o, progress: stderr}
	var err error
	if b.elf, err = guest.Copy(privatelibvirt.Dir); err != nil {
		return err
	}
	if b.conn, err = privatelibvirt.Connect(); err != nil {
		return err
	}
	defer b.conn.Close()

	versions := b.versions()
	for _, s := range sections {
		if !b.wanted(s.name) {
			continue
		}
		begin, load, wrongBefore := time.Now(), measure.Load(), len(b.wrong)
		fmt.Fprintf(stderr, "bench: %s\n", s.title)
		body, err := "", error(unavailable("a figure of time means nothing in an emulated host"))
		if !s.timed || !kvmhost.Emulated() {
			body, err = s.measure(b)
		}
		var why unavailable
		if errors.As(err, &why) {
			body, err = "Not measured in this run: "+string(why)+".\n", nil
		}
		if err != nil {
			b.wrong = append(b.wrong, fmt.Sprintf("%s: %v", s.name, err))
		}
		took := time.Since(begin).Round(time.Second)
		fmt.Fprintf(stderr, "bench: %s took %v\n", s.title, took)
		text := fmt.Sprintf("## %s\n\n%s\n\n", s.title, strings.TrimSpace(body))
		if wrong := b.wrong[wrongBefore:]; len(wrong) > 0 {
			text += "**Wrong in this run:** " + strings.Join(wrong, "; ") + ".\n\n"
		}
		text += fmt.Sprintf("<sub>Measured %s in %v, load average %s before and %s after; %s.</sub>\n",
			begin.UTC().Format("2006-01-02 15:04"), took, load, measure.Load(), versions)
		if b.page == "-" {
			fmt.Fprintln(stdout, text)
		} else if err := measure.WriteSection(b.page, s.name, text); err != nil {
			return err
		}
	}
	if len(b.wrong) > 0 {
		return errors.New(strings.Join(b.wrong, "; "))
	}
	return nil
}

func (b *bench) wanted(name string) bool {
	if b.only == "" {
		return true
	}
	for _, prefix := range strings.Split(b.only, ",") {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// check notes a claim that doesn't hold.
func (b *bench) check(ok bool, format string, args ...any) {
	if !ok {
		b.wrong = append(b.wrong, fmt.Sprintf(format, args...))
	}
}

// pick is how much a quick run does of what a full one does.
func pick[T any](b *bench, full, quick T) T {
	if b.quick {
		return quick
	}
	return full
}

// versions are those of what was measured.
func (b *bench) versions() string {
	all := append([]string{fmt.Sprintf("%d CPUs", cpus())}, privatelibvirt.Versions(b.conn)...)
	if out, err := exec.Command(privatelibvirt.Prefix+"/bin/ftclock", "version").Output(); err == nil {
		all = append(all, strings.TrimSpace(strings.SplitN(string(out), "\n", 2)[0]))
	}
	return strings.Join(all, ", ")
}

func cpus() int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 0
	}
	return set.Count()
}

// subject is a running domain of the private libvirt that is measured.
type subject struct {
	name string
	*privatelibvirt.Domain
	clock *guest.Clock
}

// startSubject starts the guest's domain, waits until its clock moves, and pauses it, so that it leaves the CPUs to the
// next one. Metadata is its own, if it isn't empty.
func (b *bench) startSubject(name, metadata string) (*subject, error) {
	d, clock, err := privatelibvirt.Started(b.conn, privatelibvirt.Manage(privatelibvirt.GuestXML(name, b.elf), metadata))
	if err != nil {
		return nil, err
	}
	s := &subject{name: name, Domain: d, clock: clock}
	if err := s.Suspend(); err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

func (s *subject) end() {
	if s.clock != nil {
		_ = s.clock.Close()
	}
	_ = s.Remove()
}

// managed lets a guest wait for its turn for as long as others are measured: that isn't to be taken for a suspend.
const managed = privatelibvirt.PatientElement

const moduleLibrary = privatelibvirt.Prefix + "/lib/ftclock/libftclock-qemu.so"

// realtimeLibrary is the competitor, where QEMU can read it.
func realtimeLibrary() (string, error) { return built.Copy(built.Realtime, privatelibvirt.Dir) }
