// Package report makes reports of how a domain's clock was kept over a period, for people who must
// prove it. From the domain's record (package record) it makes a page in HTML, a table in CSV, or
// JSON.
//
// Nothing is interpolated. The period is divided into parts that are each corrected, uncorrected,
// unknown, or without a running QEMU. Whatever isn't corrected is also said in words.
//
// It isn't a monitor: it reads only what is on disk.
package report
