// Package rig runs QEMUs without libvirt for the programs that measure costs: with a shim, with
// socat, or with nothing in front of their monitors.
//
// It isn't for tests of what ftclock does; for those see package privatelibvirt. Package measure
// measures the processes.
package rig
