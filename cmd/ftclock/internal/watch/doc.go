// Package watch draws how clocks are kept, live, on the whole screen of a terminal. It asks package status once a second, and
// judges nothing itself.
package watch
