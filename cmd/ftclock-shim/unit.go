package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"ftclock/control"
	"ftclock/spawn"
)

// reloadWait bounds an upgrade in place. The keeper itself gives a new program ten seconds to say its version.
const reloadWait = 20 * time.Second

// forUnit is what the commands of ftclock-shim@.service run, each with the instance's name.
var forUnit = map[string]func(id string, log io.Writer) int{
	"-start":  startUnit,
	"-reload": reloadUnit,
	"-ended":  unitEnded,
}

// startUnit starts the pair that the order asks for, and ends when it is ready. The two are what the unit consists of.
func startUnit(id string, log io.Writer) int {
	order, err := spawn.Take(control.Dir, id)
	if err == nil {
		order.Output = os.Stderr
		ctx, cancel := context.WithTimeout(context.Background(), order.Wait)
		defer cancel()
		if err = spawn.Start(ctx, order.Options); err != nil {
			spawn.Refuse(control.Dir, id, err)
		}
	}
	return done("starting", id, err, log)
}

// reloadUnit upgrades the pair in place, and ends when the new program serves the domain.
func reloadUnit(id string, log io.Writer) int {
	return done("upgrading", id, reload(id), log)
}

func reload(id string) error {
	before, err := status(id)
	if err != nil {
		return err
	}
	if before.Keeper <= 1 {
		return errors.New("it has no keeper")
	}
	if err := syscall.Kill(before.Keeper, syscall.SIGHUP); err != nil {
		return fmt.Errorf("telling the keeper: %w", err)
	}
	for end := time.Now().Add(reloadWait); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		// Between two workers nobody answers.
		if now, err := status(id); err == nil && now.Shim != before.Shim {
			return nil
		}
	}
	return fmt.Errorf("process %d serves on as version %s; the keeper's own line says why", before.Shim, before.Version)
}

func status(id string) (*control.Status, error) {
	answer, err := control.Ask(control.Dir, id, control.Request{Do: "status"})
	if err == nil && answer.Status == nil {
		err = errors.New("it answers without a status")
	}
	return answer.Status, err
}

// unitEnded runs when nothing of the unit is left. A pair that finished has removed its state: what is still there says
// that it was killed.
func unitEnded(id string, log io.Writer) int {
	err := spawn.CheckID(id)
	if err == nil {
		if _, ask := status(id); errors.Is(ask, control.ErrGone) {
			err = errors.Join(errors.New("both its processes were killed: libvirt gives up a domain that it carried"),
				os.RemoveAll(filepath.Join(control.Dir, id)))
		}
	}
	return done("ending", id, err, log)
}

func done(what, id string, err error, log io.Writer) int {
	if err == nil {
		return 0
	}
	l := zerolog.New(log).With().Timestamp().Logger()
	l.Error().Err(err).Msg(fmt.Sprintf("%s shim %.64q", what, id))
	return 1
}
