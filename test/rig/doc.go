// Package rig has QEMUs without libvirt for the programs that measure costs: with a shim and with socat before their
// monitors, or with neither. It measures processes from outside: memory, processor time, wake-ups.
//
// It is not for tests of what ftclock does; those have package privatelibvirt.
package rig
