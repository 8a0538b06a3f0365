// Package control is what ftclock's command line and a domain's shim say to each other: one JSON request and one JSON
// answer, each a line, over a unix socket that only root can open. It also has the names by which hook, shim and command line know
// libvirt's files and their own.
//
// A shim keeps its socket in a directory of its domain's UUID below Dir; the directory's being there means that a shim
// was started, the socket's answering that it lives. The package holds the messages, the paths and the client; the
// server is the shim's.
package control
