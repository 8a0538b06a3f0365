// Package rig runs QEMUs without libvirt for the programs that measure costs: with a shim, with
// socat, or with nothing in front of their monitors. It measures processes from outside: memory,
// processor time, wake-ups.
//
// It isn't for tests of what ftclock does; for those see package privatelibvirt.
package rig
