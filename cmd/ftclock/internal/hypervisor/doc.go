// Package hypervisor is the connection to libvirt and the domains found there: which URIs ftclock serves, what libvirt's errors
// mean to an operator, and a domain's metadata. It knows nothing of shims.
package hypervisor
