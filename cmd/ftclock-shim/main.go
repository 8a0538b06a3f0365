// Command ftclock-shim serves one domain, named by its UUID; see packages shim and keeper. What that takes it finds in the order
// that the hook or the command line left (package spawn). systemd starts it, or where there is none a keeper does, which is this
// program, too.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/rs/zerolog"

	"ftclock/control"
	"ftclock/keeper"
)

func main() {
	os.Exit(run(os.Args[1:], logTo(os.Stderr)))
}

// version is set by the build.
var version = "unknown"

// Exit statuses, beside 0 of a shim that has finished. ftclock-shim@.service knows refused: there is no use in starting it again.
const (
	failed  = 1
	usage   = 2
	refused = 3
)

func run(args []string, log io.Writer) int {
	// There is one of these for every domain: little memory, and no thread that looks for work in vain.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(10)
	flags := flag.NewFlagSet("ftclock-shim", flag.ContinueOnError)
	flags.SetOutput(log)
	showVersion := flags.Bool("version", false, "print the version and end")
	keep := flags.Bool(keeper.Flag[1:], false, "be the shim's keeper")
	upgrade := flags.Bool("reload", false, "have the shim that runs go on as this program, and wait until it does")
	state := flags.String("state", control.Dir, "directory of the shims' state")
	if err := flags.Parse(args); err != nil {
		return usage
	}
	if *showVersion {
		fmt.Println("ftclock-shim", version)
		return 0
	}
	l := zerolog.New(log).With().Timestamp().Logger()
	if flags.NArg() != 1 {
		l.Error().Msg("ftclock-shim takes the UUID of a domain; libvirt's hook, `ftclock enable --live` and `ftclock attach` start it")
		return usage
	}
	id := flags.Arg(0)
	switch {
	case *keep:
		err := keeper.Keep(func(what string) { l.Warn().Str("shim", id).Msg(what) })
		if err != nil {
			l.Error().Err(err).Str("shim", id).Msg("not serving")
			return failed
		}
		return 0
	case *upgrade:
		if err := reload(*state, id); err != nil {
			l.Error().Err(err).Str("shim", id).Msg("upgrading")
			return failed
		}
		return 0
	}
	return serve(*state, id, l)
}
