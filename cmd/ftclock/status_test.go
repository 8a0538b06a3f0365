package main

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftclock/cmd/ftclock/internal/status"
	"ftclock/test/check"
)

// A libvirt that takes a connection and says nothing doesn't hold status up.
func TestStatusOfALibvirtThatHangs(t *testing.T) {
	before := openFiles()
	socket := filepath.Join(t.TempDir(), "libvirt")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	taken := make(chan net.Conn, 1)
	go func() {
		conn, _ := l.Accept()
		taken <- conn
	}()
	var warnings []string
	known, err := (&statusCmd{}).managed(&program{dirs: status.Dirs{}}, "qemu+unix:///system?socket="+socket, 100*time.Millisecond,
		func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) })
	if known != nil || err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0], "libvirt doesn't answer within 100ms; ") || !strings.Contains(warnings[0], "; fix: ") {
		t.Errorf("%v, %v, %q", known, err, warnings)
	}
	l.Close()
	if conn := <-taken; conn != nil {
		conn.Close()
	}
	check.Await(t, 5*time.Minute, 5*time.Millisecond, func() bool { return len(openFiles()) <= len(before) }, "libvirt's client ends")
}
