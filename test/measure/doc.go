// Package measure is what the programs that measure share: statistics, processes seen from outside, tables in Markdown,
// pages of the documentation, plots.
//
// It is for test/demo, test/bench, test/soak and test/cost, and for tests that draw what they saw. It judges nothing and
// starts nothing: QEMUs without libvirt are package rig's, domains are package privatelibvirt's, and what a clock may be
// off by is in package guest.
//
// Its plots are gonum.org/v1/plot's, which no program of ftclock links: those of package report, which are part of a page
// and take their colours from it, are drawn by that package itself.
package measure
