// Package house has tests of the source itself: the direction of the imports, against the diagram in
// docs/architecture.md, and the lengths of files and functions. The functions that are still too long
// are listed in it by name.
//
// It is for people who change ftclock. It isn't a linter: `make lint` runs those.
package house
