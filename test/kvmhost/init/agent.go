package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"ftclock/test/kvmhost/protocol"

	"golang.org/x/sys/unix"
)

// agentName begins with @, so that systemd leaves the agent alone until the host is off (systemd's ROOT_STORAGE_DAEMONS).
const agentName = "@ftclock-agent"

// handOver makes the host's file systems, leaves the agent behind, and has the host's own process 1 take over. It returns only
// where that fails.
func handOver(control *os.File, job protocol.Job) error {
	if err := fileSystems(job); err != nil {
		return err
	}
	if job.Address != "" {
		if err := network("eth0", job.Address); err != nil {
			return err
		}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = agentName
	cmd.Dir, cmd.Env = "/", job.Env
	cmd.ExtraFiles = []*os.File{control} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the agent: %w", err)
	}
	return &os.PathError{Op: "exec", Path: job.Init, Err: unix.Exec(job.Init, []string{job.Init}, job.Env)}
}

// agent runs what the machine calls for, until the host is off.
func agent() {
	control := os.NewFile(3, "control")
	unix.CloseOnExec(3)
	say := &speaker{to: json.NewEncoder(control)}
	up, err := up()
	if err != nil {
		_ = say.say(protocol.Progress{Error: err.Error()})
		return
	}
	if say.say(protocol.Progress{Up: up}) != nil {
		return
	}
	askBeat := beats(say)
	heard := json.NewDecoder(control)
	for {
		var c protocol.Call
		if heard.Decode(&c) != nil {
			return
		}
		if len(c.Args) == 0 {
			askBeat()
			continue
		}
		go func() {
			result := call(c)
			_ = say.say(protocol.Progress{Result: &result})
		}()
	}
}

func call(c protocol.Call) protocol.Result {
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Dir, cmd.Stdin = "/", bytes.NewReader(c.Input)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = 5 * time.Second // what it leaves behind may have its streams
	out, err := cmd.CombinedOutput()
	r := protocol.Result{ID: c.ID, Output: out}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.Code = protocol.ExitCode(exit.Sys().(syscall.WaitStatus))
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		r.Error = err.Error()
	}
	return r
}
