// Package fakeshim serves the tests of ftclock's commands: a control server without a shim, and what shims and libvirt leave on
// disk. No command uses it.
package fakeshim
