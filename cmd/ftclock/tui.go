package main

// The rules of ftclock's user interface:
//
//   - What was asked for goes to stdout, and nothing else does.
//   - What couldn't be done is one line on stderr, "ftclock: error: ", lower case, without a full stop. Where something
//     can be tried, one line "ftclock: hint: " follows.
//   - What was done but isn't all as it should be is a line "ftclock: warning: " on stderr.
//   - Whatever comes from elsewhere (libvirt, a shim, a domain's name) is printed on one line, control characters
//     replaced, so that it can't play with the terminal.
//   - Colour only on a terminal, and not when NO_COLOR is set. Nothing is told by colour alone.
//   - A progress bar only when stderr is a terminal, and gone when it is done.
//   - No question is ever asked.

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
	"libvirt.org/go/libvirt"

	machine "ftclock/host"
)

// ui is where output goes.
type ui struct {
	stdout, stderr io.Writer
	colour         bool // on stdout
	progress       bool // stderr is a terminal
}

func newUI(stdout, stderr io.Writer) *ui {
	noColour := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	return &ui{
		stdout:   stdout,
		stderr:   stderr,
		colour:   isTerminal(stdout) && !noColour,
		progress: isTerminal(stderr),
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (u *ui) printf(format string, args ...any) {
	fmt.Fprintf(u.stdout, format, args...)
}

func (u *ui) warn(format string, args ...any) {
	fmt.Fprintf(u.stderr, "ftclock: warning: %s\n", oneLine(fmt.Sprintf(format, args...)))
}

func (u *ui) hint(format string, args ...any) {
	fmt.Fprintf(u.stderr, "ftclock: hint: %s\n", oneLine(fmt.Sprintf(format, args...)))
}

// fail tells of an error, if there is one, and gives the exit code.
func (u *ui) fail(err error) int {
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errProblem) {
		return exitProblem
	}
	fmt.Fprintf(u.stderr, "ftclock: error: %s\n", sayError(err))
	var h *hintedError
	if errors.As(err, &h) {
		u.hint("%s", h.hint)
	}
	return exitError
}

// Colours, as the terminal's own palette has them.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
)

// paint colours a word.
func (u *ui) paint(colour, word string) string {
	if !u.colour || colour == "" {
		return word
	}
	return "\x1b[" + colour + "m" + word + "\x1b[0m"
}

// hintedError is an error about which something can be done.
type hintedError struct {
	err  error
	hint string
}

func (h *hintedError) Error() string { return h.err.Error() }
func (h *hintedError) Unwrap() error { return h.err }

func hinted(err error, hint string) error { return &hintedError{err, hint} }

// sayError is an error in one line. libvirt's objects inside it are replaced by their messages.
func sayError(err error) string {
	text := err.Error()
	for _, lv := range libvirtErrors(err) {
		text = strings.ReplaceAll(text, lv.Error(), strings.TrimSpace(lv.Message))
	}
	return oneLine(strings.ReplaceAll(strings.TrimSpace(text), "\n", "; "))
}

// libvirtErrors finds libvirt's errors among all that err wraps.
func libvirtErrors(err error) []libvirt.Error {
	switch e := err.(type) {
	case libvirt.Error:
		return []libvirt.Error{e}
	case interface{ Unwrap() error }:
		return libvirtErrors(e.Unwrap())
	case interface{ Unwrap() []error }:
		var all []libvirt.Error
		for _, one := range e.Unwrap() {
			all = append(all, libvirtErrors(one)...)
		}
		return all
	}
	return nil
}

// oneLine makes one line of text, without characters that a terminal would act on.
func oneLine(text string) string { return machine.OneLine(text) }
