package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	machine "ftclock/host"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

// attachCmd serves a QEMU that libvirt didn't start: an engine's own, or the secondary of COLO.
type attachCmd struct {
	PID             int     `arg:"" name:"pid" help:"QEMU's process."`
	Clock           string  `placeholder:"XML" help:"The whole policy, a clock element as in a domain's metadata; the options below change it."`
	Reference       *string `enum:"raw,utc" placeholder:"raw|utc" help:"The host's clock that the guest follows (raw)."`
	CheckpointLimit string  `placeholder:"TIME" help:"A longer pause is a suspend: 1ms to 15m (10s)."`
}

func (attachCmd) Help() string {
	return "For a domain of libvirt's there is `ftclock enable DOMAIN --live`. Without a monitor to watch, the standing policy serves every pause."
}

func (c *attachCmd) Run(p *program) error {
	limit, err := parseLimit(c.CheckpointLimit)
	if err != nil {
		return err
	}
	policy := metadata.Default()
	if c.Clock != "" {
		if policy, err = metadata.ParseElement([]byte(c.Clock)); err != nil {
			return fmt.Errorf("--clock: %w", err)
		}
	}
	l, err := findProcess(c.PID)
	if err != nil {
		return err
	}
	options := enableCmd{Reference: c.Reference}
	if err := l.serve(p, options.apply(policy, limit)); err != nil {
		return err
	}
	return l.report(p)
}

type detachCmd struct {
	PID int `arg:"" name:"pid" help:"QEMU's process."`
}

func (c *detachCmd) Run(p *program) error {
	l, err := findProcess(c.PID)
	if err != nil {
		return err
	}
	said, err := l.leave(p)
	if err != nil {
		return err
	}
	p.printf("%s: %s\n", l.domain.name, said)
	return nil
}

// findProcess names a process as libvirt would name a domain: by its start time, too, so that the state of one that had
// the pid before isn't taken for its.
func findProcess(pid int) (*live, error) {
	if os.Geteuid() != 0 {
		return nil, hinted(errors.New("reaching into QEMU's process is for root only"), "run it as root")
	}
	if pid <= 1 {
		return nil, fmt.Errorf("%d is no process of QEMU's", pid)
	}
	stat, err := machine.ReadStat(pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no process %d", pid)
	}
	if err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	module, err := spawn.ModulePath()
	if err != nil {
		return nil, err
	}
	name := guestName(cmdline)
	if name == "" {
		name = "qemu-" + strconv.Itoa(pid)
	}
	return &live{
		domain: &domain{name: name, uuid: fmt.Sprintf("pid-%d-%d", pid, stat.Started)},
		pid:    pid,
		module: module,
	}, nil
}

// guestName is the name that QEMU's command line gives the guest; "" without one.
func guestName(cmdline []byte) string {
	args := strings.Split(string(cmdline), "\x00")
	i := slices.Index(args, "-name")
	if i < 0 || i+1 >= len(args) {
		return ""
	}
	name := strings.TrimPrefix(args[i+1], "guest=")
	// A comma in a name is doubled (qemu(1), -name).
	name = strings.ReplaceAll(name, ",,", "\x00")
	name, _, _ = strings.Cut(name, ",")
	return strings.ReplaceAll(name, "\x00", ",")
}
