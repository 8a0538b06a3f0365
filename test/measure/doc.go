// Package measure is what the programs that measure share: statistics, processes seen from outside, tables in Markdown,
// pages of the documentation, plots.
//
// It is for test/demo, test/bench, test/soak and test/cost, and for tests that draw what they saw. It judges nothing and
// starts nothing: QEMUs without libvirt are package rig's, domains are package privatelibvirt's, and what a clock may be
// off by is in package guest.
//
// It is the only package that imports gonum.org/v1/plot, apart from what draws with it. The pictures of package report
// are drawn by that package itself, since they take their colours from the page that they are part of.
package measure
