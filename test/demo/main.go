// Command demo shows what ftclock is for: it makes the same checkpoints of the same kvmclock guest twice, with stock
// libvirt and QEMU and with ftclock, and prints and draws what either leaves of the guest's clock.
//
// It is for whoever wants to see ftclock work before installing it, by `make demo`. Everything runs inside a private
// libvirt (package privatelibvirt). It measures from outside the guest and trusts nothing that ftclock says, but for the
// cost of the module. It is not a test of costs: they are printed, and judged by nobody.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"ftclock/test/built"
	"ftclock/test/kvmhost"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
)

func main() {
	os.Exit(run(os.Stdout, os.Stderr))
}

// run happens three times, as privatelibvirt.Main says; only one of them comes to demonstrate.
func run(stdout, stderr *os.File) int {
	if why := privatelibvirt.MissingFor("demo"); why != "" {
		fmt.Fprintln(stderr, "demo: error:", why)
		return 1
	}
	return privatelibvirt.Main(func() int {
		fmt.Fprintln(stderr, "demo     libvirt is up")
		if err := demonstrate(stdout, stderr); err != nil {
			fmt.Fprintln(stderr, "demo: error:", err)
			return 1
		}
		return 0
	}, privatelibvirt.Options{Prepare: func() error {
		announce(stdout)
		fmt.Fprintln(stderr, "demo     installing ftclock there and starting libvirt")
		root, err := built.Root()
		if err != nil {
			return err
		}
		return privatelibvirt.Install(root)
	}})
}

func announce(w io.Writer) {
	fmt.Fprintf(w, "Pausing a kvmclock guest %d times for %d ms through libvirt: first stock, then with ftclock.\n", checkpoints, pause.Milliseconds())
	fmt.Fprintln(w, "Both run in a libvirt of their own, in namespaces; the machine's own libvirt isn't touched.")
	fmt.Fprintf(w, "It takes one to three minutes and leaves %s and %s.\n\n", svgPath, pngPath)
}

// where says what the clocks were measured on.
func where(conn *libvirt.Connect) string {
	host := strings.Join(privatelibvirt.Versions(conn), ", ")
	if kvmhost.Emulated() {
		host += "; the host was EMULATED: the clocks are real KVM's, but the times in µs mean nothing"
	}
	return host
}

// demonstrate makes both runs and shows them. What it finds wrong with a clock is its error.
func demonstrate(stdout, stderr *os.File) (err error) {
	l, err := open()
	if err != nil {
		return err
	}
	defer l.close()
	var subjects []*subject
	for _, run := range []struct{ name, metadata string }{{"stock", ""}, {"ftclock", privatelibvirt.ClockElement}} {
		s, failed := l.start(run.name, run.metadata)
		if failed != nil {
			return failed
		}
		defer func() { err = errors.Join(err, s.remove()) }()
		if err := s.follow(newProgress(stderr)); err != nil {
			return err
		}
		subjects = append(subjects, s)
	}
	fmt.Fprintln(stderr, "both     in turns, for the costs")
	if err := compareCosts(subjects...); err != nil {
		return err
	}
	stock, kept, host := &subjects[0].course, &subjects[1].course, where(l.conn)
	fmt.Fprintf(stdout, "\n%s\n%s\n\n", table(stock, kept), host)
	if err := writePicture(svgPath, pngPath, stock, kept, host); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n%s\n", svgPath, pngPath)
	return verdict(stock, kept)
}
