// Package systemd holds the tests of the shim's unit, in a container that boots a whole Debian. FTCLOCK_SUITE names another
// suite than Debian 12's.
package systemd
