package metadata

import (
	"fmt"
	"unicode/utf8"

	"ftclock/host"
)

// Error is what is wrong with a document, and where.
type Error struct {
	// Path leads to the element or attribute, with the prefixes that the document uses, such as
	// /domain/metadata/ftclock:clock/ftclock:on[2]/@limit. Empty: the document as a whole.
	Path string
	// Line counts from 1. 0: no line in particular.
	Line int
	// Reason says what is wrong, Allowed what would be right instead.
	Reason, Allowed string
}

// Error is always one line.
func (e *Error) Error() string {
	where := e.Path
	if where == "" {
		where = "XML"
	}
	if e.Line > 0 {
		where += fmt.Sprintf(" (line %d)", e.Line)
	}
	return host.Printable(fmt.Sprintf("%s: %s; allowed: %s", where, e.Reason, e.Allowed))
}

// shorten keeps a name or value that came from the document readable in an error.
func shorten(s string) string {
	const limit = 60
	if len(s) <= limit {
		return s
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

func quote(s string) string { return fmt.Sprintf("%q", shorten(s)) }
