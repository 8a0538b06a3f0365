package fakeshim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"ftclock/control"
	"ftclock/record"
	metadata "ftclock/xml-templates"
)

// MakeDir leaves the directory of a shim below dir, and returns its path. Nobody listens in it.
func MakeDir(dir string, info control.Info) (string, error) {
	path := filepath.Join(dir, info.UUID)
	text, err := json.Marshal(info)
	if err != nil {
		return "", err
	}
	return path, errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, control.InfoName), text, 0o600))
}

// Shim is a control server without a shim: it says what it was told to say.
type Shim struct {
	listener net.Listener
	Path     string
	group    sync.WaitGroup

	mu     sync.Mutex
	status control.Status
	asked  []control.Request
}

// Start starts a fake shim below dir. Its version must have the word fake in it.
func Start(dir string, status control.Status) (*Shim, error) {
	if !strings.Contains(status.Version, "fake") {
		return nil, fmt.Errorf("the version %q doesn't say that the shim is a fake", status.Version)
	}
	path, err := MakeDir(dir, control.Info{Name: status.Name, UUID: status.UUID, Mode: status.Mode})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(path, control.SocketName))
	if err != nil {
		return nil, err
	}
	f := &Shim{listener: l, Path: path, status: status}
	f.group.Go(f.serve)
	return f, nil
}

// Kill ends it as a crash does: its directory stays.
func (f *Shim) Kill() {
	f.listener.Close()
	f.group.Wait()
}

// Stop ends it in good order.
func (f *Shim) Stop() {
	f.Kill()
	os.RemoveAll(f.Path)
}

func (f *Shim) serve() {
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

func (f *Shim) answer(request control.Request) control.Answer {
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

// Say changes what a fake shim answers.
func (f *Shim) Say(change func(*control.Status)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.status)
}

// Forget leaves in libvirt's directory and the records what a running domain leaves that was managed at an earlier start.
func Forget(libvirt, records, name, uuid string) error {
	text := "<domstatus><domain type='kvm' id='1'><name>" + name + "</name><uuid>" + uuid + "</uuid></domain></domstatus>"
	return errors.Join(os.WriteFile(filepath.Join(libvirt, "forgotten.xml"), []byte(text), 0o600), record.SetManaged(records, uuid, true))
}

// Last is the last request that it had.
func (f *Shim) Last() control.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[len(f.asked)-1]
}

// UUID is a domain's.
const UUID = "11111111-1111-4111-8111-111111111111"
