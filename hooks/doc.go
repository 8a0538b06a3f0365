// Package hooks is libvirt's qemu hook: at a managed domain's start it puts the shim between libvirt and QEMU, or beside them, and
// after the domain's end it cleans up. See libvirt.org/hooks.html for when libvirt calls and with what.
//
// It is for cmd/ftclock-hook. It never calls libvirt, which waits for it with the domain locked.
package hooks
