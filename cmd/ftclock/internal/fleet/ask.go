package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/control"
	"ftclock/host"
)

// Bounds of one question to another host: how long it may take, and how long its answer and its errors may be, in bytes.
const (
	maxWait   = 30 * time.Second
	maxAnswer = 64 << 20
	maxErrors = 64 << 10
)

// Answer is what a host says.
type Answer struct {
	Entries  []status.Entry
	Warnings []string
}

// Ask asks another host for its domains, with so many of the newest records of each. It gives up after 30 seconds.
//
// ssh has the words of the command interpreted by the user's shell there, so none of them is anybody's but ours.
func (h Host) Ask(ctx context.Context, records int) (Answer, error) {
	return h.askWithin(ctx, records, maxWait)
}

func (h Host) askWithin(ctx context.Context, records int, within time.Duration) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", slices.Concat(h.ssh, []string{"ftclock", "-c", "qemu:///system", "status", "--format", "json", "--records", strconv.Itoa(records)})...)
	cmd.WaitDelay = time.Second // for what ssh itself may have started
	stdout, stderr := &bounded{max: maxAnswer}, &bounded{max: maxErrors}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err := cmd.Run()
	said := readSaid(string(stderr.text))
	var exit *exec.ExitError
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = h.byHand(fmt.Errorf("it didn't answer within %v", within))
	case ctx.Err() != nil:
		err = ctx.Err()
	case stdout.over || stderr.over:
		err = ui.Hinted(fmt.Errorf("it says more than %d MiB, or has more errors than %d KiB", maxAnswer>>20, maxErrors>>10),
			"`ssh "+h.hand+" true` must print nothing")
	case err == nil, errors.As(err, &exit) && exit.ExitCode() == ui.ExitProblem:
		var entries []status.Entry
		if entries, err = readStatus(stdout.text); err == nil {
			for i := range entries {
				entries[i].On = h.Name
			}
			return Answer{entries, said.warnings}, nil
		}
	case exit != nil:
		err = h.refused(exit.ExitCode(), said)
	}
	return Answer{}, h.failed(err)
}

// failed says which host it was.
func (h Host) failed(err error) error {
	wrapped := fmt.Errorf("asking %s: %w", h.Name, err)
	if errors.Is(err, exec.ErrNotFound) {
		return ui.Hinted(wrapped, "other hosts are asked by ssh: install openssh-client")
	}
	return wrapped
}

// byHand says how a person sees more of what went wrong there.
func (h Host) byHand(err error) error {
	return ui.Hinted(err, "`ssh "+h.hand+" ftclock status` shows whether it is ssh, libvirt or ftclock there")
}

// refused words the end of ssh with a code that isn't a status's.
func (h Host) refused(code int, said said) error {
	switch {
	case code == 127:
		return ui.Hinted(errors.New("ftclock isn't installed there"), "`ssh "+h.hand+" ftclock --version` must find it: install it in /usr/bin there")
	case code == 255:
		return ui.Hinted(errors.New(said.last), "`ssh -oBatchMode=yes "+h.hand+" true` tries the same; it needs a key")
	case code == ui.ExitError && said.failed == "":
		return ui.Hinted(fmt.Errorf("what answers there isn't this ftclock: %s", said.last), "`ssh "+h.hand+" ftclock --version` must say the version of this one")
	case code != ui.ExitError:
		return h.byHand(fmt.Errorf("the command there ended with %d: %s", code, said.last))
	case strings.HasPrefix(said.failed, "unknown flag") || strings.HasPrefix(said.failed, "unexpected argument") || strings.HasPrefix(said.failed, "--"):
		return ui.Hinted(errors.New("ftclock is of another version there: "+said.failed), "`ssh "+h.hand+" ftclock --version` tells it; install the same here and there")
	case said.hint == "run it as root":
		return ui.Hinted(errors.New(said.failed), "-c qemu+ssh://root@"+h.Name+"/system asks as root")
	case said.hint != "":
		return ui.Hinted(errors.New(said.failed), "on "+h.Name+": "+said.hint)
	}
	return ui.Hinted(errors.New(said.failed), "`ssh "+h.hand+" ftclock doctor` checks that host")
}

// said is what came on the standard error, each one line.
type said struct {
	failed, hint string // of ftclock there
	warnings     []string
	last         string // the last line, whosever
}

func readSaid(text string) (s said) {
	s.last = "it doesn't say why"
	for line := range strings.Lines(text) {
		line = host.OneLine(line)
		if line == "" {
			continue
		}
		s.last = line
		if rest, ok := strings.CutPrefix(line, "ftclock: error: "); ok {
			s.failed = rest
		} else if rest, ok := strings.CutPrefix(line, "ftclock: hint: "); ok {
			s.hint = rest
		} else if rest, ok := strings.CutPrefix(line, "ftclock: warning: "); ok {
			s.warnings = append(s.warnings, rest)
		}
	}
	return s
}

// plainState is what a state may be: it is printed as it is.
var plainState = regexp.MustCompile(`^[a-z][a-z-]{0,19}$`)

// readStatus reads what status --format json printed. A host may have been taken over, so what it says is checked like everything
// that is printed. Members that aren't known are of a newer version, and are left out.
func readStatus(text []byte) ([]status.Entry, error) {
	var all []struct {
		control.Status
		Version *string `json:"version"` // without a shim there is none
	}
	other := func(err error) error {
		return ui.Hinted(fmt.Errorf("its answer isn't a status: %w", err), "is ftclock of another version there? Does its shell print something at a login?")
	}
	if err := json.Unmarshal(bytes.TrimSpace(text), &all); err != nil {
		return nil, other(err)
	}
	entries := make([]status.Entry, 0, len(all))
	for _, one := range all {
		if one.Name == "" || one.UUID == "" || !plainState.MatchString(string(one.State)) {
			return nil, other(fmt.Errorf("a domain %q with the state %q", one.Name, one.State))
		}
		e := status.Entry{Mute: one.Version == nil, Status: one.Status}
		if one.Version != nil {
			e.Version = *one.Version
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// bounded is a buffer that refuses what is too much, which ends what writes it.
type bounded struct {
	text []byte
	max  int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if len(b.text)+len(p) > b.max {
		b.over = true
		return 0, io.ErrShortBuffer
	}
	b.text = append(b.text, p...)
	return len(p), nil
}
