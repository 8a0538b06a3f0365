package ui

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"ftclock/host"

	"golang.org/x/term"
	"libvirt.org/go/libvirt"
)

// UI is where output goes.
type UI struct {
	Stdout, Stderr io.Writer
	Colour         bool // on stdout
	Progress       bool // stderr is a terminal
}

// New makes a UI of two streams. What it may do with them depends on whether they are terminals.
func New(stdout, stderr io.Writer) *UI {
	noColour := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	return &UI{
		Stdout:   stdout,
		Stderr:   stderr,
		Colour:   IsTerminal(stdout) && !noColour,
		Progress: IsTerminal(stderr),
	}
}

// IsTerminal tells whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Printf prints what was asked for to stdout.
func (u *UI) Printf(format string, args ...any) {
	fmt.Fprintf(u.Stdout, format, args...)
}

// Warn prints a warning as one line to stderr.
func (u *UI) Warn(format string, args ...any) {
	fmt.Fprintf(u.Stderr, "ftclock: warning: %s\n", host.OneLine(fmt.Sprintf(format, args...)))
}

// Hint prints what can be tried as one line to stderr.
func (u *UI) Hint(format string, args ...any) {
	fmt.Fprintf(u.Stderr, "ftclock: hint: %s\n", host.OneLine(fmt.Sprintf(format, args...)))
}

// Fail tells of an error, if there is one, and gives the exit code.
func (u *UI) Fail(err error) int {
	if err == nil {
		return ExitOK
	}
	if errors.Is(err, ErrProblem) {
		return ExitProblem
	}
	if errors.Is(err, ErrTold) {
		return ExitError
	}
	u.Tell("error", err)
	return ExitError
}

// Tell prints an error of that kind on one line, and its hint, if it has one, on another.
func (u *UI) Tell(kind string, err error) {
	fmt.Fprintf(u.Stderr, "ftclock: %s: %s\n", kind, ErrorText(err))
	if hint := HintOf(err); hint != "" {
		u.Hint("%s", hint)
	}
}

// Colours, as the terminal's own palette has them.
const (
	Red    = "31"
	Green  = "32"
	Yellow = "33"
)

// Paint colours a word.
func (u *UI) Paint(colour, word string) string {
	if !u.Colour || colour == "" {
		return word
	}
	return "\x1b[" + colour + "m" + word + "\x1b[0m"
}

// Exit codes.
const (
	ExitOK = 0
	// exitProblem: the answer was given, and it is a bad one (a clock isn't corrected, a check found something). Monitoring
	// plugins call it a warning.
	ExitProblem = 1
	// exitError: what was asked for couldn't be done, or wasn't understood. Monitoring plugins call it unknown.
	ExitError = 3
)

// ErrProblem makes the exit code exitProblem; what is wrong has been printed.
var ErrProblem = errors.New("problems were found")

// ErrTold makes the exit code ExitError; what couldn't be done has been told.
var ErrTold = errors.New("something couldn't be done")

// hintedError is an error about which something can be done.
type hintedError struct {
	err  error
	hint string
}

func (h *hintedError) Error() string { return h.err.Error() }

func (h *hintedError) Unwrap() error { return h.err }

// Hinted adds to an error what can be tried.
func Hinted(err error, hint string) error { return &hintedError{err, hint} }

// HintOf is what can be tried about an error; empty if nothing is known.
func HintOf(err error) string {
	var h *hintedError
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}

// ErrorText is an error in one line. libvirt's objects inside it are replaced by their messages.
func ErrorText(err error) string {
	text := err.Error()
	for _, lv := range libvirtErrors(err) {
		text = strings.ReplaceAll(text, lv.Error(), strings.TrimSpace(lv.Message))
	}
	return host.ErrorLine(errors.New(text))
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
