// Package unit has systemd start a domain's shim, in a unit of its own, where systemd runs the host; elsewhere it
// starts it as package spawn does. It is for the hook and for the command line. The shim itself knows nothing of D-Bus.
package unit
