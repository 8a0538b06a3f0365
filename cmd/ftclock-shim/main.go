// Command ftclock-shim serves one domain; see package shim. The hook and the command line start it.
package main

import (
	"io"
	"os"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stderr))
}

// version is set by the build.
var version = "unknown"

func run(args []string, log io.Writer) int {
	config, ready, err := parse(args, log)
	if err == nil {
		err = serve(config, ready)
	}
	if err != nil {
		config.Log.Error().Err(err).Msg("not serving")
		ready.say(err.Error())
		return 1
	}
	return 0
}
