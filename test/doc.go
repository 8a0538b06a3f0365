// Package test has no code. Its only test checks that the helpers in the folders below import no test, no program and no helper
// above them.
//
// Tests share check (errors, bounds, waiting) and domaintest (domains, their clocks, pauses and states); programs that
// measure share measure (statistics, processes, tables, plots). Both use privatelibvirt for libvirt and its domains, rig for
// QEMUs without libvirt, guest and linuxguest for what runs in them, and kvmhost and container for where it all runs.
package test
