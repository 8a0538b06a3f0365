// Package unit asks systemd to start a domain's shim, in a unit of its own. On a host without
// systemd it starts the shim as package spawn does.
//
// It is for the hook and the command line. The shim itself knows nothing of D-Bus.
package unit
