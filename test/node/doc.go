// Package node tests `ftclock node` as a service of the whole host: in the host's own pid, network and user namespaces, as
// the kernel tells nobody else which programs start. Only what it writes to is the tests' own.
package node
