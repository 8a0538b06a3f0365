// Package hooks is libvirt's qemu hook. When a managed domain starts, it puts the shim between
// libvirt and QEMU, or starts it beside them; after the domain's end it cleans up.
// libvirt.org/hooks.html says when libvirt calls a hook and with what.
//
// It is for cmd/ftclock-hook. It never calls libvirt, which waits for the hook with the domain
// locked.
package hooks
