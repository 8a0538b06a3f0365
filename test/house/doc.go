// Package house keeps the house in order: its tests check the direction of the imports, and the lengths of files and functions. What
// it can't hold of them yet stands in a list by name.
package house
