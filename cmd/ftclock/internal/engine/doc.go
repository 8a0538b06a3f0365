// Package engine pauses and resumes a domain through libvirt, as a checkpoint engine does, and judges what the pauses left of the
// guest's clock. What else happens, the domain is left running.
package engine
