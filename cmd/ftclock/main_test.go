package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"ftclock/control"
	"ftclock/record"
	"ftclock/test/history"
	metadata "ftclock/xml-templates"
)

// shimsVariable tells the program under test where its script's fake shims are.
const shimsVariable = "SHIMS"

// recordsName is where in there its records are: no shim's directory has such a name.
const recordsName = ".records"

func TestMain(m *testing.M) {
	testscript.Main(leakCheck{m}, map[string]func(){
		"ftclock": func() {
			shims = os.Getenv(shimsVariable)
			records = filepath.Join(shims, recordsName)
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

// cmdFakeShim (fakeshim FILE) starts a fake shim that has FILE, a control.Status in JSON, for its status.
func cmdFakeShim(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: fakeshim FILE")
	}
	var status control.Status
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &status))
	f, err := startFakeShim(ts.Getenv(shimsVariable), status)
	ts.Check(err)
	ts.Defer(f.stop)
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
	_, err := makeShimDir(ts.Getenv(shimsVariable), control.Info{Name: args[0], UUID: args[1], Mode: control.Relay})
	ts.Check(err)
}

func makeShimDir(dir string, info control.Info) (string, error) {
	path := filepath.Join(dir, info.UUID)
	text, err := json.Marshal(info)
	if err != nil {
		return "", err
	}
	return path, errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, control.InfoName), text, 0o600))
}

// fakeShim is a control server without a shim: it says what it was told to say.
type fakeShim struct {
	listener net.Listener
	path     string
	group    sync.WaitGroup

	mu     sync.Mutex
	status control.Status
	asked  []control.Request
}

func startFakeShim(dir string, status control.Status) (*fakeShim, error) {
	if !strings.Contains(status.Version, "fake") {
		return nil, fmt.Errorf("the version %q doesn't say that the shim is a fake", status.Version)
	}
	path, err := makeShimDir(dir, control.Info{Name: status.Name, UUID: status.UUID, Mode: status.Mode})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(path, control.SocketName))
	if err != nil {
		return nil, err
	}
	f := &fakeShim{listener: l, path: path, status: status}
	f.group.Go(f.serve)
	return f, nil
}

func (f *fakeShim) stop() {
	f.listener.Close()
	f.group.Wait()
	os.RemoveAll(f.path)
}

func (f *fakeShim) serve() {
	for {
		conn, err := f.listener.Accept()
		if err != nil {
			return
		}
		var request control.Request
		if err := control.Receive(conn, &request); err == nil {
			_ = control.Send(conn, f.answer(request))
		}
		conn.Close()
	}
}

func (f *fakeShim) answer(request control.Request) control.Answer {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, request)
	switch request.Do {
	case "status":
		status := f.status
		if n := len(status.Records); n > request.Records {
			status.Records = status.Records[n-request.Records:]
		}
		return control.Answer{Status: &status}
	case "policy":
		f.status.Clock = request.Clock
		return control.Answer{}
	case "anchor":
		return control.Answer{Anchor: &metadata.Anchor{Clock: 77e9, Real: 1700000000e9, Raw: 88e9, Boot: "fake", Rate: -1500, Error: 150, HostError: 2000, Synchronised: true}}
	case "import":
		if f.status.State == control.Uncorrected {
			return control.Answer{Error: "the module isn't loaded"}
		}
		return control.Answer{}
	}
	return control.Answer{Error: "the fake doesn't know " + request.Do}
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
