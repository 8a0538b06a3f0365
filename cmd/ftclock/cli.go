package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"ftclock/cmd/ftclock/internal/status"
	"ftclock/cmd/ftclock/internal/ui"
	"ftclock/policy"

	"github.com/alecthomas/kong"
)

// cli is the command line.
type cli struct {
	Connect []string         `short:"c" placeholder:"URI" sep:"none" help:"Connect to the hypervisor at this URI; status and watch take several. Default: LIBVIRT_DEFAULT_URI, or else qemu:///system."`
	Version kong.VersionFlag `help:"Show the version and quit."`

	Enable   enableCmd   `cmd:"" help:"Correct a domain's clock."`
	Disable  disableCmd  `cmd:"" help:"Stop correcting a domain's clock."`
	Attach   attachCmd   `cmd:"" help:"Correct the clock of a QEMU that libvirt didn't start."`
	Detach   detachCmd   `cmd:"" help:"Stop correcting such a QEMU's clock."`
	Node     nodeCmd     `cmd:"" help:"Correct the clocks of all QEMUs of this host that its policy names."`
	Anchor   anchorCmd   `cmd:"" help:"Hand a guest's clock over to another host or process."`
	Status   statusCmd   `cmd:"" help:"Show how the domains' clocks are kept."`
	Watch    watchCmd    `cmd:"" help:"Show the same live, full screen."`
	Report   reportCmd   `cmd:"" help:"Report how a domain's clock was kept, as evidence for an audit."`
	Policy   policyCmd   `cmd:"" help:"The host's policy, for domains whose metadata somebody else writes."`
	Doctor   doctorCmd   `cmd:"" help:"Check this host for what ftclock needs."`
	Verify   verifyCmd   `cmd:"" help:"Pause a running domain a few times and check whether its clock holds."`
	Exporter exporterCmd `cmd:"" help:"Serve metrics for Prometheus."`
	Exercise exerciseCmd `cmd:"" help:"Pause and resume a running domain as a checkpoint engine does."`
	// Version is the flag's name.
	Versions versionCmd `cmd:"" name:"version" help:"Show the versions of ftclock and of its parts."`
}

// program is what each command runs with.
type program struct {
	*ui.UI
	stdin io.Reader
	ctx   context.Context // ends when the operator interrupts
	uris  []string        // as given with --connect
	dirs  status.Dirs
}

// uri is the one URI of a command that has no use for several; "" is libvirt's default.
func (p *program) uri() string {
	if len(p.uris) == 0 {
		return ""
	}
	return p.uris[0]
}

// exit is the panic by which kong ends the program, with its exit code.
type exit int

// run is the whole program except for os.Exit.
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
		kong.Vars{"version": "ftclock " + programVersion(), "policies": policy.Dir},
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
	if name := command.Selected().Name; len(c.Connect) > 1 && name != "status" && name != "watch" {
		return u.Fail(ui.Hinted(fmt.Errorf("%s works with one hypervisor, and -c was given %d times", name, len(c.Connect)), "only status and watch show several"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return u.Fail(command.Run(&program{UI: u, stdin: stdin, ctx: ctx, uris: c.Connect, dirs: status.HostDirs}))
}

// explainUsage adds a hint to kong's error: where the usage is shown.
func explainUsage(err error, args []string) error {
	where := "ftclock --help"
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil && parse.Context.Selected() != nil {
		where = "ftclock " + parse.Context.Selected().Name + " --help"
	}
	return ui.Hinted(err, fmt.Sprintf("`%s` shows the usage", where))
}
