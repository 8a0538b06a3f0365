package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
	"ftclock/record"
	"ftclock/test/history"
)

// shimsVariable tells the program under test where its script's fake shims are.
const shimsVariable = "SHIMS"

// recordsName is where in there its records are: no shim's directory has such a name.
const recordsName = ".records"

func TestMain(m *testing.M) {
	testscript.Main(leakCheck{m}, map[string]func(){
		"ftclock": func() {
			status.HostDirs.Shims = os.Getenv(shimsVariable)
			status.HostDirs.Records = filepath.Join(status.HostDirs.Shims, recordsName)
			main()
		},
	})
}

// leakCheck fails a run that leaves more descriptors open than there were.
type leakCheck struct{ m *testing.M }

func (l leakCheck) Run() int {
	before := openFiles()
	code := l.m.Run()
	after := openFiles()
	for fd, target := range after {
		if before[fd] == "" && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "pipe:") { // the runtime's own
			fmt.Fprintf(os.Stderr, "descriptor %s is left open: %s\n", fd, target)
			code = max(code, 1)
		}
	}
	return code
}

func openFiles() map[string]string {
	found := make(map[string]string)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			found[e.Name()] = target
		}
	}
	return found
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			// Short: a socket's path has 108 bytes.
			dir, err := os.MkdirTemp("", "shims")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			e.Setenv(shimsVariable, dir)
			others, err := os.MkdirTemp("", "hosts")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(others) })
			e.Setenv("OTHERS", others)
			e.Setenv("LIBVIRT_DEFAULT_URI", "test:///default")
			e.Setenv("TZ", "UTC")
			e.Setenv("RECORDS", filepath.Join(dir, recordsName))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fakeshim": cmdFakeShim,
			"deadshim": cmdDeadShim,
			"exits":    cmdExits,
			"record":   cmdRecord,
			"newer":    cmdNewer,
		},
	})
}

// cmdFakeShim (fakeshim FILE [HOST]) starts a fake shim that has FILE, a control.Status in JSON, for its status. With a host it is in
// $OTHERS, for a stand-in of ssh.
func cmdFakeShim(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: fakeshim FILE [HOST]")
	}
	dir := ts.Getenv(shimsVariable)
	if len(args) == 2 {
		dir = filepath.Join(ts.Getenv("OTHERS"), args[1])
	}
	var status control.Status
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &status))
	f, err := fakeshim.Start(dir, status)
	ts.Check(err)
	ts.Defer(f.Stop)
}

// cmdRecord (record NAME UUID) makes a record of half an hour, one pause a second, from 2024-11-23 09:00 UTC on. In the
// middle nobody looked for ten minutes.
func cmdRecord(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: record NAME UUID")
	}
	h := history.New(filepath.Join(ts.Getenv(shimsVariable), recordsName), args[1], args[0], time.Date(2024, 11, 23, 9, 0, 0, 0, time.UTC), "raw")
	h.Minutes(10, 60)
	h.Unseen(600, time.Second)
	h.Look()
	h.Minutes(10, 60)
	h.End(record.EndQEMU)
}

// cmdNewer (newer FILE) replaces a file of a record by one of a version to come.
func cmdNewer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: newer FILE")
	}
	text := []byte(`{"kind":"head","format":"ftclock-record","version":999,"holds":"timeline","uuid":"77777777-f6a4-8304-79aa-97f2502e193f"}`)
	sum := crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli))
	ts.Check(os.WriteFile(args[0], fmt.Appendf(nil, "%08x %s\nwhat only it understands\n", sum, text), 0o600))
	opened := filepath.Join(filepath.Dir(args[0]), "open.log")
	if err := os.Remove(opened); !errors.Is(err, os.ErrNotExist) {
		ts.Check(err)
	}
}

// cmdDeadShim (deadshim NAME UUID) leaves the directory of a shim that doesn't live.
func cmdDeadShim(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: deadshim NAME UUID")
	}
	_, err := fakeshim.MakeDir(ts.Getenv(shimsVariable), control.Info{Name: args[0], UUID: args[1], Mode: control.Relay})
	ts.Check(err)
}

// told runs the program in this process.
func told(args ...string) (stdout, stderr string, code int) {
	var out, err bytes.Buffer
	code = run(args, nil, &out, &err)
	return out.String(), err.String(), code
}

// cmdExits (exits CODE PROGRAM ARG…) is exec for a program that must end with this code.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	code := 0
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}
