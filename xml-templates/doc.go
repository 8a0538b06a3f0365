// Package metadata (import path ftclock/xml-templates) is ftclock's part of a libvirt domain's XML:
// its schema, its parser, its editor, and the snippets for people to paste.
//
// It serves the hook (is this domain managed, and with which policy?), the shim (which pauses are
// caught up?) and the command line (enable and disable). It isn't a library for domain XML: it
// reads only what these three need from the rest of the domain, and changes no byte of it.
//
// Anything unknown is refused, because a misspelled policy must not become a clock that is silently
// wrong. Each refusal is one line that says where, what, and what is allowed instead. ftclock.rng
// defines the same language for other tools, and ftclock-policy.rng that of a host's policy; tests
// compare them with the parser.
package metadata
