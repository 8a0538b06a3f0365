// Package record keeps how a domain's clock was kept, on disk, a minute at a time, and reads it back. A domain's shim
// is the writer; the command line and whoever writes a report are the readers.
//
// A record holds for each minute how many pauses there were, what they would have taken from the guest's clock, how far
// the clock was from its anchor, what was decided and why, and how well the host's own clock was synchronised; and
// the last pauses one by one. It also holds what it doesn't know: a Gap is a time or a number of pauses of which
// nothing is told, and nothing is ever put in its place.
//
// docs/record.md describes the files. They are no database: no index, no query, and one writer.
package record
