// Package doctor checks a host for what ftclock needs. Each check is a Finding with what fixes it. The probe proves the rest: a
// managed domain that lives for a second and is removed with all that it leaves.
package doctor
