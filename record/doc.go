// Package record stores on disk how a domain's clock was kept, one entry a minute, and reads it
// back. A domain's shim is the writer. The command line and programs that make reports are the
// readers.
//
// A record has for each minute the number of pauses, what they would have taken from the guest's
// clock, the residuals, the decisions and their reasons, and how well the host's own clock was
// synchronised. It also has the last pauses one by one. And it shows what it doesn't know: a Gap is
// a time, or a number of pauses, about which nothing is known. Nothing ever replaces a gap.
//
// docs/record.md describes the files. They aren't a database: there is no index, no query, and one
// writer.
package record
