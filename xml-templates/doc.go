// Package metadata (import path ftclock/xml-templates) is the part of a libvirt domain's XML that
// belongs to ftclock: its schema, its parser, its editor and the snippets that a person pastes.
//
// It serves the hook (is this domain ours, and with which policy?), the shim (which pauses are caught
// up?) and the CLI (enable and disable). It is not a domain XML library: of the rest of the domain it
// reads what these three need, and leaves every byte of it where it was.
//
// What isn't known refuses: a policy that was misspelled must not become a clock that is silently
// wrong. Every refusal is one line that says where, what, and what is allowed instead. The same
// language is defined for other tools by ftclock.rng; a test holds the two together.
package metadata
