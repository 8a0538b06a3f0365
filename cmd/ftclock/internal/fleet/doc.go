// Package fleet asks hosts how they keep their domains' clocks: which hosts a command line names, and, for another host, by ssh what
// ftclock there says. libvirt's connection to another host carries metadata and the domains' states alone: whether a clock is
// corrected, its pauses and its residual are known to the shims, which only root on that host may ask.
//
// It is for the commands that show several hosts. It changes nothing on any of them, and keeps no connection.
package fleet
