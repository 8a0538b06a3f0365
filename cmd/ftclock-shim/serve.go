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

	"ftclock/control"
	shim "ftclock/qmp-shim"
)

// notifier is the pipe to whoever started us, on which one line is said. Nil says nothing.
type notifier struct{ f *os.File }

func (n *notifier) say(line string) {
	if n == nil || n.f == nil {
		return
	}
	line, _, _ = strings.Cut(line, "\n")
	_, _ = n.f.WriteString(line + "\n")
	_ = n.f.Close()
	n.f = nil
}

func parse(args []string, log io.Writer) (shim.Config, *notifier, error) {
	c := shim.Config{Version: version, State: control.Dir}
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
	readyFD := flags.Int("ready-fd", -1, "descriptor to say \"ready\" or an error on")
	showVersion := flags.Bool("version", false, "print the version and end")
	if err := flags.Parse(args); err != nil {
		return c, nil, err
	}
	if *showVersion {
		fmt.Println("ftclock-shim", version)
		os.Exit(0)
	}
	var ready *notifier
	if *readyFD >= 0 {
		syscall.CloseOnExec(*readyFD)
		ready = &notifier{os.NewFile(uintptr(*readyFD), "ready")}
	}
	c.Log = c.Log.With().Str("domain", c.Name).Logger()
	switch {
	case flags.NArg() > 0:
		return c, ready, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case c.UUID == "" || strings.ContainsAny(c.UUID, "/."):
		return c, ready, errors.New("-uuid takes the domain's UUID")
	case c.Module == "":
		return c, ready, errors.New("-module takes the path of libftclock-qemu.so")
	case (c.DomainDir == "") == (c.PID == 0):
		return c, ready, errors.New("either -domain-dir or -watch is needed")
	case c.DomainDir != "" && c.PIDFile == "":
		return c, ready, errors.New("-domain-dir goes with -pid-file")
	}
	return c, ready, nil
}

func serve(c shim.Config, ready *notifier) error {
	syscall.Umask(0o077)
	c.Ready = func() { ready.say("ready") }
	return shim.Run(c)
}
