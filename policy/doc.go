// Package policy reads the host's policy: files that name domains and give them the clock element
// that their own metadata doesn't have, where a management system writes that metadata and drops
// what somebody added.
//
// It is for the hook, which asks it about a domain that starts, and for the command line, which shows
// it. It changes nothing, and a domain's own metadata is read before it: see package metadata.
package policy
