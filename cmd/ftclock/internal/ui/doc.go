// Package ui is how ftclock's commands speak to an operator: output, errors with hints, tables, durations. It knows nothing of
// domains and clocks. Its rules:
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
package ui
