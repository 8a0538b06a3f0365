// Package clockpage is the Go side of the memory page that ftclock's module inside QEMU shares with
// ftclock's shim outside it. clockpage.h defines the page; this package mirrors it, and a test
// compares the two.
//
// It is for the shim, which writes the policy and the orders, and for tools that read the pauses'
// records. It isn't a general shared-memory library, and it decides nothing: the module alone
// decides about the clock.
//
// A page belongs to a process that a guest may have taken over. So readers bound their retries,
// never panic, and tell three cases apart: a page that isn't ready (ErrNotYet), one that changed
// during the read (ErrTorn), and a record that the ring no longer holds (ErrStale).
package clockpage
