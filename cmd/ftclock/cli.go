package main

import (
	"context"
	"errors"
	"fmt"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"
)

// cli is the command line.
type cli struct {
	Connect string           `short:"c" placeholder:"URI" help:"Connect to the hypervisor at this URI. Default: LIBVIRT_DEFAULT_URI, or else qemu:///system."`
	Version kong.VersionFlag `help:"Show the version and quit."`

	Enable   enableCmd   `cmd:"" help:"Have a domain's clock corrected."`
	Disable  disableCmd  `cmd:"" help:"Leave a domain's clock to QEMU again."`
	Attach   attachCmd   `cmd:"" help:"Serve a QEMU that libvirt didn't start."`
	Detach   detachCmd   `cmd:"" help:"Leave such a QEMU's clock to it again."`
	Anchor   anchorCmd   `cmd:"" help:"Hand a guest's clock on to the host or process that goes on with the guest."`
	Status   statusCmd   `cmd:"" help:"Show how the domains' clocks are kept."`
	Watch    watchCmd    `cmd:"" help:"Show the same live, on the whole screen."`
	Report   reportCmd   `cmd:"" help:"Tell how a domain's clock was kept, for people who have to prove it."`
	Doctor   doctorCmd   `cmd:"" help:"Check this host for what ftclock needs."`
	Verify   verifyCmd   `cmd:"" help:"Pause a running domain a few times, and say whether its clock holds."`
	Exporter exporterCmd `cmd:"" help:"Serve metrics for Prometheus."`
	Exercise exerciseCmd `cmd:"" help:"Pause and resume a running domain as a checkpoint engine does."`
	// Versions can't be called Version, which is the flag's.
	Versions versionCmd `cmd:"" name:"version" help:"Show the versions of ftclock and of its parts."`
}

// program is what a command gets to work with.
type program struct {
	*ui.UI
	stdin io.Reader
	ctx   context.Context // ends when the operator interrupts
	uri   string          // as given with --connect
	dirs  status.Dirs
}

// exit is what kong's asking for the end becomes.
type exit int

// run is the whole program but for the exit.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) (code int) {
	u := ui.New(stdout, stderr)
	defer func() {
		if e, ok := recover().(exit); ok {
			code = int(e)
		}
	}()

	var c cli
	parser, err := kong.New(&c,
		kong.Name("ftclock"),
		kong.Description("Keeps the clocks of fault-tolerant KVM guests right across checkpoints, from outside the guest."),
		kong.Vars{"version": "ftclock " + programVersion()},
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { panic(exit(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
	)
	if err != nil {
		panic(err) // a mistake in the tags above
	}
	if line, asked := completing(os.Getenv); asked {
		complete(stdout, parser.Model.Node, line)
		return ui.ExitOK
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	command, err := parser.Parse(args)
	if err != nil {
		return u.Fail(explainUsage(err, args))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return u.Fail(command.Run(&program{UI: u, stdin: stdin, ctx: ctx, uri: c.Connect, dirs: status.HostDirs}))
}

// explainUsage adds where help is found to what kong says.
func explainUsage(err error, args []string) error {
	where := "ftclock --help"
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil && parse.Context.Selected() != nil {
		where = "ftclock " + parse.Context.Selected().Name + " --help"
	}
	return ui.Hinted(err, fmt.Sprintf("`%s` shows what can be given", where))
}
