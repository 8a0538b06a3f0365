// Package keeper lets a shim survive its own death. Two processes hold every descriptor that matters: the worker, which
// does the work, and the keeper, which does nothing but wait. When one of them dies, the other starts it again with all
// descriptors, so that neither libvirt nor QEMU sees a connection end.
//
// It is for cmd/ftclock-shim. It knows descriptors by name and looks into none of them; what the worker remembers
// between two lives is in a memory file that is one of them.
package keeper
