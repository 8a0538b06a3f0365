// Command run runs a command on a KVM host: on this machine where it has /dev/kvm, else on an emulated one. See package
// kvmhost.
package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"ftclock/test/container"
	"ftclock/test/kvmhost"

	"github.com/alecthomas/kong"
	"golang.org/x/term"
)

// testing are what the end-to-end tests run besides libvirt and QEMU.
var testing = []string{"make", "iproute2", "qemu-utils"}

func main() { os.Exit(run()) }

func run() int {
	var o struct {
		Suite    string        `help:"Debian suite whose kernel the emulated host has: bookworm, trixie, sid." placeholder:"SUITE"`
		Debian   string        `help:"Debian suite whose kernel, libvirt and QEMU the emulated host has. Wants root." placeholder:"SUITE"`
		Append   string        `help:"Further arguments of the emulated host's kernel." placeholder:"ARGUMENTS"`
		Write    []string      `help:"Directory that the command shares with this machine; may be repeated." placeholder:"DIR"`
		Timeout  time.Duration `help:"End the command after that time." placeholder:"DURATION"`
		Terminal bool          `help:"Give the command this terminal."`
		Where    bool          `help:"Say whether commands run on native or emulated KVM, and do nothing."`
		Kernel   string        `help:"Fetch the kernel of that Debian, print its path, and do nothing else."`
		Command  []string      `arg:"" optional:"" passthrough:"" help:"The command."`
	}
	kong.Parse(&o, kong.Name("kvmhost"), kong.Description("Run a command on a KVM host, emulated where this machine is none."))
	if o.Where {
		return where()
	}
	if o.Kernel != "" {
		path, err := kvmhost.Kernel(o.Kernel)
		if err != nil {
			fmt.Fprintln(os.Stderr, "host: error:", err)
			return 125
		}
		fmt.Println(path)
		return 0
	}
	args := o.Command
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		args, o.Terminal = []string{"/bin/bash"}, term.IsTerminal(int(os.Stdin.Fd()))
	}
	options := kvmhost.Options{Suite: o.Suite, Append: o.Append, Write: o.Write, Timeout: o.Timeout, Terminal: o.Terminal}
	code, err := 0, error(nil)
	if o.Debian != "" {
		options.Suite = o.Debian
		options.Root, err = container.Image(o.Debian, testing...)
	}
	if err == nil {
		code, err = kvmhost.Run(options, args...)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "host: error:", err)
		if errors.Is(err, kvmhost.ErrHost) {
			return 75 // EX_TEMPFAIL of sysexits.h: try again
		}
		return 125 // as env(1) and docker run say that they failed themselves
	}
	return code
}

func where() int {
	native, err := kvmhost.Native()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "host: error:", err)
		return 125
	case native:
		fmt.Println("native")
	default:
		fmt.Println("emulated")
	}
	return 0
}
