// Package spawn starts a domain's shim as a process of its own and waits until it can be connected to. It is for the
// hook and for the command line; it is no supervisor.
package spawn

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/rs/zerolog"

	"ftclock/keeper"
)

// LogDir is where shims write their logs, a file a domain.
const LogDir = "/var/log/ftclock"

// Ready is the name of the inherited descriptor on which the shim says one line: "ready", or what is wrong.
const Ready = "ready"

// JournalStream is the variable by which a program knows that its output goes to systemd's journal: systemd.exec(5).
const JournalStream = "JOURNAL_STREAM"

// Options say what the shim is for. Either DomainDir and PIDFile or PID is set.
type Options struct {
	UUID  string
	Name  string
	Clock string // the domain's clock element as XML; "" watches only

	DomainDir string // a relay: the domain's directory, in which QEMU's socket has been renamed already
	PIDFile   string // a relay: the file that will hold QEMU's pid

	// A relay of a QEMU that is started to load a state: shim.Config.Incoming, and the anchor that came with it, as XML.
	Incoming, Anchor string

	PID int // a watch: QEMU's pid

	Module string // path of libftclock-qemu.so; "" is the installed one

	// Output takes what the shim logs; nil is a log of its own in LogDir.
	Output *os.File `json:"-"`
}

// Start starts the shim and returns when it is ready. The shim has its own session, none of the caller's descriptors,
// and outlives the caller. An error carries the shim's own line; the shim has ended then. When ctx ends first, both its
// processes are killed.
func Start(ctx context.Context, o Options) error {
	path, err := ShimPath()
	if err != nil {
		return err
	}
	if o.Module == "" {
		if o.Module, err = ModulePath(); err != nil {
			return err
		}
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
	}
	defer ready.Close()
	defer theirs.Close()
	output, hint := o.Output, ""
	if output == nil {
		if output, err = openLog(o.Name); err != nil {
			// No reason not to keep a clock.
			hint = " (and it has no log: " + err.Error() + ")"
			if output, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
				return fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
			}
		}
		defer output.Close()
	}

	cmd := exec.Command(path, o.args()...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", keeper.EnvFDs + "=" + Ready + "=3"}
	if stream := os.Getenv(JournalStream); stream != "" {
		cmd.Env = append(cmd.Env, JournalStream+"="+stream)
	}
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = []*os.File{theirs} // the first is descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
	}
	theirs.Close()

	line := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(io.LimitReader(ready, 4096)).ReadString('\n')
		line <- strings.TrimSpace(text)
	}()
	select {
	case text := <-line:
		if text == "ready" {
			return cmd.Process.Release()
		}
		kill(cmd) // it may be about to try again, of which nobody will know any more
		if text == "" {
			text = "the shim ended without a word" + hint
		}
		return errors.New(text)
	case <-ctx.Done():
		kill(cmd)
		return fmt.Errorf("starting the shim of domain %s: not ready in time%s", o.Name, hint)
	}
}

// kill ends a keeper and its workers. A keeper that is stopped first can't replace a worker; a worker, killed first, can't
// replace its keeper.
func kill(keeper *exec.Cmd) {
	_ = keeper.Process.Signal(syscall.SIGSTOP)
	_, _ = syscall.Wait4(keeper.Process.Pid, nil, syscall.WUNTRACED, nil) // until it has stopped, or ended
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", keeper.Process.Pid))
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		for _, child := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(child); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	_ = keeper.Process.Kill()
	_ = keeper.Wait()
}

func (o Options) args() []string {
	args := []string{keeper.KeeperFlag, "-uuid", o.UUID, "-name", o.Name, "-clock", o.Clock, "-module", o.Module}
	if o.DomainDir != "" {
		return append(args, "-domain-dir", o.DomainDir, "-pid-file", o.PIDFile, "-incoming", o.Incoming, "-anchor", o.Anchor)
	}
	return append(args, "-watch", strconv.Itoa(o.PID))
}

// openLog opens the log of a domain's shim. Domain names have no slash (libvirt refuses them); one that had could
// only spoil its own log's name.
func openLog(domain string) (*os.File, error) {
	if err := os.MkdirAll(LogDir, 0o750); err != nil {
		return nil, fmt.Errorf("making the log directory: %w", err)
	}
	name := strings.ReplaceAll(domain, "/", "_") + ".log"
	f, err := os.OpenFile(filepath.Join(LogDir, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, fmt.Errorf("opening the shim's log: %w", err)
	}
	return f, nil
}

// PIDFile is where libvirt, with its state in the directory run, keeps the pid of a domain's QEMU. It escapes the
// name as if it went into XML (libvirt's src/util/virpidfile.c, virPidFileBuildPath).
func PIDFile(run, domain string) string {
	return filepath.Join(run, escape.Replace(domain)+".pid")
}

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&apos;")

// ShimPath finds ftclock-shim: beside the running program, or in sbin beside its directory.
func ShimPath() (string, error) {
	return find("ftclock-shim", "", "../sbin")
}

// ModulePath finds libftclock-qemu.so: beside the running program, or in lib/ftclock beside its directory.
func ModulePath() (string, error) {
	return find("libftclock-qemu.so", "", "../lib/ftclock")
}

func find(name string, dirs ...string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding %s: %w", name, err)
	}
	var tried []string
	for _, dir := range dirs {
		path := filepath.Join(filepath.Dir(self), dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
		tried = append(tried, path)
	}
	return "", fmt.Errorf("finding %s: not at %s", name, strings.Join(tried, " nor "))
}

// Note adds a warning to the log of a domain's shim, for a domain that has none.
func Note(domain, warning string) {
	f, err := openLog(domain)
	if err != nil {
		return
	}
	defer f.Close()
	log := zerolog.New(f).With().Timestamp().Str("domain", domain).Logger()
	log.Warn().Msg(warning)
}
