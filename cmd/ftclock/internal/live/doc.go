// Package live serves a QEMU that runs already: a domain of libvirt's, or a process that libvirt didn't start. It starts a shim
// beside it, or has the shim that is there follow another policy. The domain's definition isn't its concern.
package live
