// Package host reads this machine: its processes, its clock, its boot, and the places where libvirt and ftclock keep their
// files; and it words what was read as one line for people. It is for every other package and imports none of them.
//
// It decides nothing: what a start time proves, or whether a clock is good enough, is its callers' business. Whatever another
// process had a hand in, such as its name in /proc/PID/stat, is taken as untrusted.
package host
