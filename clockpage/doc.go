// Package clockpage is the Go side of the page of memory that ftclock's module inside QEMU shares with ftclock's shim
// outside it. clockpage.h is the page's definition; this package mirrors it, and a test compares the two.
//
// It is for the shim, which writes the policy and the orders, and for the tools that read the records. It is not a
// general shared-memory library, and it decides nothing: the rule of the clock lives in the module.
//
// Whatever is read from a page comes from a process that a guest may have taken over. Readers bound their retries,
// never panic, and tell apart a page that isn't ready (ErrNotYet), one that changed under them (ErrTorn), and a
// record that the ring no longer holds (ErrStale).
package clockpage
