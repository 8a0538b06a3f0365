// Command ftclock-shim serves one domain; see packages shim and keeper. The hook and the command line start it, or have
// systemd do so, as the keeper, which starts the worker.
package main

import (
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"ftclock/keeper"
)

func main() {
	os.Exit(run(os.Args[1:], logTo(os.Stderr)))
}

// version is set by the build.
var version = "unknown"

func run(args []string, log io.Writer) int {
	// There is a pair of these for every domain: little memory, and no thread that looks for work in vain.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(10)
	part := ""
	if len(args) > 0 {
		part = args[0]
	}
	switch part {
	case keeper.KeeperFlag:
		return keep(args[1:], log)
	case keeper.WorkerFlag:
		return work(args[1:], log)
	}
	if act := forUnit[part]; act != nil && len(args) == 2 {
		return act(args[1], log)
	}
	return work(args, log) // by hand: without a keeper
}
