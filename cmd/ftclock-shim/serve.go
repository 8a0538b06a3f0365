package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/keeper"
	shim "ftclock/qmp-shim"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

// awaited says whether somebody waits for the shim to be ready, at the other end of a pipe.
func awaited(store *keeper.Store) bool {
	fd, ok := store.Get(spawn.Ready)
	if !ok {
		return false
	}
	p := []unix.PollFd{{Fd: int32(fd)}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLERR == 0
}

// notify says one line to whoever started the shim and waits for it. Later workers have nobody to tell.
func notify(store *keeper.Store, line string) {
	fd, ok := store.Get(spawn.Ready)
	if !ok {
		return
	}
	line, _, _ = strings.Cut(line, "\n")
	_, _ = syscall.Write(fd, []byte(line+"\n"))
	store.Drop(spawn.Ready)
}

func parse(args []string, log io.Writer) (shim.Config, error) {
	c := shim.Config{Version: version, State: control.Dir, LastStops: control.LastStops}
	c.Log = zerolog.New(log).With().Timestamp().Logger()
	flags := flag.NewFlagSet("ftclock-shim", flag.ContinueOnError)
	flags.SetOutput(log)
	flags.StringVar(&c.UUID, "uuid", "", "the domain's UUID")
	flags.StringVar(&c.Name, "name", "", "the domain's name")
	flags.StringVar(&c.Clock, "clock", "", "the domain's clock element as XML; empty: watch only")
	flags.StringVar(&c.Module, "module", "", "path of libftclock-qemu.so")
	flags.StringVar(&c.DomainDir, "domain-dir", "", "relay: the domain's directory")
	flags.StringVar(&c.PIDFile, "pid-file", "", "relay: the file that will hold QEMU's pid")
	flags.IntVar(&c.PID, "watch", 0, "watch: QEMU's pid")
	flags.StringVar(&c.Incoming, "incoming", "", "relay: QEMU loads a state that was migrated or restored")
	anchor := flags.String("anchor", "", "relay: the anchor element that came with that state")
	flags.StringVar(&c.State, "state", control.Dir, "directory of the shims' state")
	flags.StringVar(&c.LastStops, "last-stops", control.LastStops, "directory of readings for restored guests")
	showVersion := flags.Bool("version", false, "print the version and end")
	if err := flags.Parse(args); err != nil {
		return c, err
	}
	if *showVersion {
		fmt.Println("ftclock-shim", version)
		os.Exit(0)
	}
	c.Log = c.Log.With().Str("domain", c.Name).Logger()
	if *anchor != "" {
		a, err := metadata.ParseAnchor([]byte(*anchor))
		if err != nil {
			return c, fmt.Errorf("-anchor: %w", err)
		}
		c.Anchor = &a
	}
	switch {
	case c.Incoming != "" && c.Incoming != control.Migrated && c.Incoming != control.Restored:
		return c, fmt.Errorf("-incoming is %s or %s", control.Migrated, control.Restored)
	case flags.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case c.UUID == "" || strings.ContainsAny(c.UUID, "/."):
		return c, errors.New("-uuid takes the domain's UUID")
	case c.Module == "":
		return c, errors.New("-module takes the path of libftclock-qemu.so")
	case (c.DomainDir == "") == (c.PID == 0):
		return c, errors.New("either -domain-dir or -watch is needed")
	case c.DomainDir != "" && c.PIDFile == "":
		return c, errors.New("-domain-dir goes with -pid-file")
	}
	return c, nil
}

// work is the worker: it serves the domain.
func work(args []string, log io.Writer) int {
	config, err := parse(args, log)
	store, serr := keeper.Open(func(what string) { config.Log.Warn().Msg(what) })
	if serr != nil {
		config.Log.Error().Err(serr).Msg("not serving")
		return 1
	}
	syscall.Umask(0o077)
	// As long as somebody waits for it to be ready, it has not begun: then an error ends it.
	later := shim.Begun(store) && !awaited(store)
	if err == nil {
		config.Store, config.Later = store, later
		config.Ready = func() { notify(store, "ready") }
		err = shim.Run(config)
	}
	if err != nil {
		config.Log.Error().Err(err).Msg("not serving")
		notify(store, err.Error())
		if later {
			return 1 // a domain runs behind the connections that are held: the keeper tries again
		}
	}
	store.Done()
	if err != nil {
		return 1
	}
	return 0
}

// keep is the keeper: it has one worker after the other serve the domain.
func keep(args []string, log io.Writer) int {
	config, err := parse(args, log)
	if err == nil {
		err = keeper.Keep(func(what string) { config.Log.Warn().Msg(what) })
	}
	if err != nil {
		config.Log.Error().Err(err).Msg("not serving")
		return 1
	}
	return 0
}
