// Package fds watches a test program's own file descriptors.
package fds

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// Run runs the tests, and fails a run that leaves descriptors behind. It returns the exit status.
func Run(m *testing.M) int {
	before := Open()
	code := m.Run()
	if after := Open(); code == 0 && len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "descriptors leaked: before %v, after %v\n", before, after)
		code = 1
	}
	return code
}

// Open gives what is open: each descriptor's number and what it leads to, but for those of Go's runtime.
func Open() (targets []string) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.Contains(target, "eventpoll") && !strings.Contains(target, "eventfd") && !strings.HasPrefix(target, "/proc/") {
			targets = append(targets, e.Name()+" "+target)
		}
	}
	return targets
}
