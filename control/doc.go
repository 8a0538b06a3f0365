// Package control has the requests that ftclock's command line sends to a domain's shim, and the
// replies: one JSON value each, on one line, over a unix socket that only root can open. It also
// has the names of the files of libvirt and ftclock that hook, shim and command line use.
//
// A shim keeps its socket in a directory named for its domain's UUID, below Dir. If the directory
// exists, a shim was started; if the socket answers, the shim lives. This package has the messages,
// the paths and the client. The server is in qmp-shim.
package control
