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

	"ftclock/host"
	"ftclock/keeper"
)

// JournalStream is the variable by which a program knows that its output goes to systemd's journal: systemd.exec(5).
const JournalStream = "JOURNAL_STREAM"

// Start starts the shim under a keeper, and returns when it is ready. dir is the state directory. Both have a session of their own,
// none of the caller's descriptors, and outlive the caller. An error carries the shim's own line; the shim has ended then. When ctx
// ends first, both processes are killed.
func Start(ctx context.Context, dir string, o Spec) error {
	path, err := ShimPath()
	if err != nil {
		return err
	}
	hint := ""
	output, err := openLog(o.Name)
	if err != nil {
		// No reason not to keep a clock.
		hint = " (and it has no log: " + err.Error() + ")"
		if output, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
		}
	}
	defer output.Close()
	process, err := StartProgram(ctx, path, output, dir, o)
	if err == nil {
		return process.Release()
	}
	if errors.Is(err, errSilent) {
		return fmt.Errorf("starting the shim of domain %s: %w%s", o.Name, err, hint)
	}
	return err
}

// errSilent is the error of a shim that has neither got ready nor said why.
var errSilent = errors.New("the shim didn't get ready")

// StartProgram is Start with a program of the shim's at path, which logs to output. The keeper is a child of this process.
func StartProgram(ctx context.Context, path string, output *os.File, dir string, o Spec) (*os.Process, error) {
	if err := Leave(dir, o); err != nil {
		return nil, err
	}
	defer Take(dir, o.UUID)
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
	}
	defer ready.Close()
	defer theirs.Close()
	cmd := exec.Command(path, keeper.Flag, "-state", dir, o.UUID)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "GOMAXPROCS=1"}, keeper.Passed([]string{keeper.ReadyName})...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the shim of domain %s: %w", o.Name, err)
	}
	theirs.Close()
	lines := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(io.LimitReader(ready, 16)).ReadString('\n')
		lines <- text
	}()
	select {
	case text := <-lines:
		if text == "ready\n" {
			return cmd.Process, nil
		}
	case <-ctx.Done():
	}
	kill(cmd) // it may be about to try again, of which nobody will know any more
	if reason := Refusal(dir, o.UUID); reason != "" {
		return nil, errors.New(reason)
	}
	return nil, errSilent
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

// openLog opens the log of a domain's shim. Domain names have no slash (libvirt refuses them); one that had could
// only spoil its own log's name.
func openLog(domain string) (*os.File, error) {
	if err := os.MkdirAll(host.LogDir, 0o750); err != nil {
		return nil, fmt.Errorf("making the log directory: %w", err)
	}
	name := strings.ReplaceAll(domain, "/", "_") + ".log"
	f, err := os.OpenFile(filepath.Join(host.LogDir, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, fmt.Errorf("opening the shim's log: %w", err)
	}
	return f, nil
}

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
