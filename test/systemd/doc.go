// Package systemd tests the shim's unit, in a container that boots a whole Debian. FTCLOCK_SUITE
// names another suite than Debian 12's. For hosts that lose power or migrate guests see package
// wholehost.
package systemd
