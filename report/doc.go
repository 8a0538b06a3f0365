// Package report says how a domain's clock was kept over a time, for people who have to prove it: from the domain's record
// (package record) it makes a page in HTML, a table in CSV, and JSON.
//
// Nothing is interpolated. The time is cut into stretches of which each is corrected, uncorrected, not known, or without a running
// QEMU, and whatever isn't corrected is said in words, too.
//
// It is no monitor: it reads what is on disk.
package report
