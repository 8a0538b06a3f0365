package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"syscall"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/host"
	"ftclock/keeper"
	shim "ftclock/qmp-shim"
	"ftclock/spawn"
	metadata "ftclock/xml-templates"
)

// specName is the name of the spec among the descriptors that are kept: a memory file that is never changed.
const specName = "spec"

// serve serves the domain, from its start on or in the place of a shim that died.
func serve(state, id string, log zerolog.Logger) int {
	syscall.Umask(0o077)
	store, err := keeper.Open(func(what string) { log.Warn().Str("shim", id).Msg(what) })
	if err != nil {
		log.Error().Err(err).Str("shim", id).Msg("not serving")
		return failed
	}
	began := shim.Begun(store)
	spec, err := specOf(store, state, id)
	if err == nil {
		log = log.With().Str("domain", spec.Name).Logger()
		began, err = shim.Run(config(spec, store, state, log))
	}
	switch {
	case err == nil:
		store.Done()
		return 0
	case began:
		log.Error().Err(err).Msg("not serving, and started again: a domain runs behind the connections that are held")
		return failed
	}
	log.Error().Err(err).Str("shim", id).Msg("not serving")
	spawn.Refuse(state, id, err)
	store.Done()
	return refused
}

func config(spec spawn.Spec, store *keeper.Store, state string, log zerolog.Logger) shim.Config {
	c := shim.Config{
		Version: version, State: state, Store: store, Log: log,
		UUID: spec.UUID, Name: spec.Name, Clock: spec.Clock, Policy: spec.Policy, Module: spec.Module, LastStops: spec.Stops,
		DomainDir: spec.DomainDir, PIDFile: spec.PIDFile, PID: spec.PID, Incoming: spec.Incoming,
		Sealed: spec.Sealed(),
	}
	if c.Module == "" {
		c.Module, _ = spawn.ModulePath() // which was there when the domain started
	}
	if c.LastStops == "" {
		c.LastStops = host.DataDir
	}
	if spec.Anchor != "" {
		if a, err := metadata.ParseAnchor([]byte(spec.Anchor)); err == nil { // as it was checked already
			c.Anchor = &a
		}
	}
	c.Begin = func() error {
		if order, err := spawn.Read(state, spec.UUID); err != nil || order != spec || !spawn.Take(state, spec.UUID) {
			return errors.New("its start was given up")
		}
		return nil
	}
	return c
}

// specOf gives what the last shim of this start was told, or else what the order says.
func specOf(store *keeper.Store, state, id string) (spawn.Spec, error) {
	if fd, ok := store.Get(specName); ok {
		var spec spawn.Spec
		text := make([]byte, 1<<20)
		n, err := unix.Pread(fd, text, 0)
		if err == nil {
			err = json.Unmarshal(text[:n], &spec) // checked when it was stored, maybe by another version
		}
		if err != nil {
			return spec, fmt.Errorf("reading what to serve: %w", err)
		}
		return spec, nil
	}
	spec, err := spawn.Read(state, id)
	if err == nil && spec.Module == "" {
		_, err = spawn.ModulePath()
	}
	if err != nil {
		return spec, err
	}
	text, err := spec.Text()
	if err != nil {
		return spec, err
	}
	fd, err := host.ConstantFile("ftclock-spec", text)
	if err != nil {
		return spec, fmt.Errorf("keeping what to serve: %w", err)
	}
	store.Put(specName, fd)
	return spec, nil
}
