package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
)

// reloadWait bounds an upgrade in place. The program that runs gives a new one ten seconds to say its version.
const reloadWait = 20 * time.Second

// reload has the shim that runs go on as the program that is installed now, and returns when that serves the domain.
func reload(state, id string) error {
	before, err := status(state, id)
	if err != nil {
		return err
	}
	told := 0
	for end := time.Now().Add(reloadWait); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		now, err := status(state, id) // between the two nobody answers
		switch {
		case err == nil && now.Workers != before.Workers:
			return nil
		case err == nil:
			pid := now.Shim
			if now.Keeper > 0 {
				pid = now.Keeper // another one may have come meanwhile
			}
			if pid == told {
				continue
			}
			if err := unix.Kill(pid, unix.SIGHUP); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("telling process %d: %w", pid, err)
			}
			told = pid
		case before.Keeper == 0 && errors.Is(unix.Kill(before.Shim, 0), unix.ESRCH):
			return nil // it was killed meanwhile, and systemd starts the installed program when this one has ended
		}
	}
	return fmt.Errorf("process %d serves on as version %s; its log says why", before.Shim, before.Version)
}

func status(state, id string) (*control.Status, error) {
	answer, err := control.Ask(state, id, control.Request{Do: "status"})
	if err == nil && answer.Status == nil {
		err = errors.New("it answers without a status")
	}
	return answer.Status, err
}
