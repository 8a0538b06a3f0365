package spawn

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

const testID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

func relayOrder() Spec {
	return Spec{
		UUID: testID, Name: `a "name" & more`, Clock: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`,
		DomainDir: "/var/lib/libvirt/qemu/domain-1-a", PIDFile: "/run/libvirt/qemu/a.pid",
	}
}

func TestAnOrderArrives(t *testing.T) {
	for _, id := range []string{testID, "pid-4711-123456"} {
		dir := filepath.Join(t.TempDir(), "made by the first")
		o := relayOrder()
		if id != testID {
			o = Spec{UUID: id, Name: "engine", PID: 4711, Module: "/usr/lib/ftclock/libftclock-qemu.so"}
		}
		if err := Leave(dir, o); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(orderPath(dir, id))
		if err != nil || info.Mode().Perm() != 0o600 || !Waiting(dir, id) {
			t.Fatalf("the order's file: %v, %v", info, err)
		}
		got, err := Read(dir, id)
		if err != nil || got != o {
			t.Errorf("%+v, not %+v; %v", got, o, err)
		}
		if !Take(dir, id) {
			t.Error("it can't be taken")
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 0 {
			t.Errorf("left: %v", entries)
		}
		if Take(dir, id) || Waiting(dir, id) {
			t.Error("it was taken twice")
		}
	}
}

// However the two meet, an order is carried out or withdrawn, never both and never neither.
func TestAnOrderIsTakenOrWithdrawn(t *testing.T) {
	dir := t.TempDir()
	for range 300 {
		if err := Leave(dir, relayOrder()); err != nil {
			t.Fatal(err)
		}
		var had atomic.Int32
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() {
				if Take(dir, testID) {
					had.Add(1)
				}
			})
		}
		both.Wait()
		if n := had.Load(); n != 1 {
			t.Fatalf("%d of the two have it", n)
		}
	}
}

func TestABadOrderIsNotLeft(t *testing.T) {
	for what, change := range map[string]func(*Spec){
		"no UUID":              func(o *Spec) { o.UUID = "web1" },
		"a path for a UUID":    func(o *Spec) { o.UUID = "../" + testID },
		"no name":              func(o *Spec) { o.Name = "" },
		"a name of two lines":  func(o *Spec) { o.Name = "a\nb" },
		"a long name":          func(o *Spec) { o.Name = strings.Repeat("n", 4097) },
		"a bad policy":         func(o *Spec) { o.Clock = strings.Replace(o.Clock, "/>", ` mode="x"/>`, 1) },
		"both kinds":           func(o *Spec) { o.PID = 4711 },
		"neither kind":         func(o *Spec) { o.DomainDir = "" },
		"init":                 func(o *Spec) { o.DomainDir, o.PIDFile, o.PID = "", "", 1 },
		"a negative pid":       func(o *Spec) { o.DomainDir, o.PIDFile, o.PID = "", "", -4711 },
		"a relative directory": func(o *Spec) { o.DomainDir = "domain-1-a" },
		"a way up":             func(o *Spec) { o.DomainDir += "/../../etc" },
		"no pid file":          func(o *Spec) { o.PIDFile = "" },
		"a relative module":    func(o *Spec) { o.Module = "libftclock-qemu.so" },
		"a long path":          func(o *Spec) { o.PIDFile = "/" + strings.Repeat("p", unix.PathMax) },
		"a relative stops":     func(o *Spec) { o.Stops = "stops" },
		"an unknown state":     func(o *Spec) { o.Incoming = "found" },
		"a bad anchor":         func(o *Spec) { o.Anchor = "<anchor/>" },
	} {
		dir := t.TempDir()
		o := relayOrder()
		change(&o)
		if err := Leave(dir, o); err == nil {
			t.Error("left:", what)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 0 {
			t.Errorf("%s left %v", what, entries)
		}
	}
}

func TestABadFileIsRefused(t *testing.T) {
	good := `{"UUID":"` + testID + `","Name":"a","PID":4711}`
	path := func(dir string) string { return orderPath(dir, testID) }
	put := func(text string, mode os.FileMode) func(string) error {
		return func(dir string) error {
			return errors.Join(os.WriteFile(path(dir), []byte(text), mode), os.Chmod(path(dir), mode))
		}
	}
	check := func(make func(string) error) error {
		dir := t.TempDir()
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		_, err := Read(dir, testID)
		return err
	}
	if err := check(put(good, 0o600)); err != nil {
		t.Fatal("a good one: ", err)
	}
	for what, make := range map[string]func(string) error{
		"nothing":          func(string) error { return nil },
		"an empty file":    put("", 0o600),
		"half a file":      put(good[:40], 0o600),
		"another's UUID":   put(strings.Replace(good, "6695", "6696", 1), 0o600),
		"an unknown field": put(strings.Replace(good, "}", `,"Exec":"/bin/sh"}`, 1), 0o600),
		"two of them":      put(good+good, 0o600),
		"a wrong type":     put(strings.Replace(good, "4711", `"4711"`, 1), 0o600),
		"a huge pid":       put(strings.Replace(good, "4711", "1e30", 1), 0o600),
		"a long file":      put(good+strings.Repeat(" ", maxOrder), 0o600),
		"a readable file":  put(good, 0o644),
		"a writable file":  put(good, 0o620),
		"a directory":      func(dir string) error { return os.Mkdir(path(dir), 0o700) },
		"a pipe":           func(dir string) error { return unix.Mkfifo(path(dir), 0o600) },
		"a link": func(dir string) error {
			return errors.Join(os.WriteFile(dir+"/target", []byte(good), 0o600), os.Symlink("target", path(dir)))
		},
	} {
		if err := check(make); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestCheckID(t *testing.T) {
	for id, good := range map[string]bool{
		testID: true, host.ProcessUUID(2, 2): true,
		"": false, "web1": false, strings.ToUpper(testID): false, testID + "0": false, "-----": false,
		strings.Replace(testID, "-", "_", 1): false, "/" + testID[1:]: false, testID[:35] + "\n": false,
		"pid-2": false, "pid--2": false, "pid-2-x": false, "pid-2-2-3": false, "pid-2-" + strings.Repeat("2", 60): false,
		"pid-1-2": false, "pid-+2-2": false, "pid-02-2": false, "pid-2-": false,
	} {
		if err := CheckID(id); (err == nil) != good {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestARefusalIsHeardOnce(t *testing.T) {
	dir := t.TempDir()
	Refuse(dir, testID, errors.New("nobody waits"))
	if got := Refusal(dir, testID); got != "" {
		t.Errorf("%q", got)
	}
	if err := Leave(dir, relayOrder()); err != nil {
		t.Fatal(err)
	}
	Refuse(dir, testID, errors.New("no such luck\nand more"))
	if got := Refusal(dir, testID); got != "no such luck; and more" {
		t.Errorf("%q", got)
	}
	if got := Refusal(dir, testID); got != "" {
		t.Errorf("again: %q", got)
	}
	Refuse(dir, "../x", errors.New("no"))
	Refuse(dir, testID, errors.New(strings.Repeat("x", maxRefusal+1)))
	if err := Leave(dir, relayOrder()); err != nil {
		t.Fatal(err)
	}
	if got := Refusal(dir, testID); got != "" {
		t.Errorf("of an earlier order: %q", got)
	}
}

func FuzzOrder(f *testing.F) {
	f.Add([]byte(`{"UUID":"` + testID + `","Name":"a","PID":4711}`))
	f.Add([]byte(`{"UUID":"` + testID + `","Name":"a","DomainDir":"/d","PIDFile":"/p","Clock":""}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		o, err := Parse(text)
		if err != nil {
			return
		}
		if err := o.check(); err != nil {
			t.Fatalf("accepted: %+v: %v", o, err)
		}
		again, err := o.Text()
		if err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		if o2, err := Parse(again); err != nil || o2 != o {
			t.Fatalf("%+v became %+v: %v", o, o2, err)
		}
	})
}

// The keeper in here is a shell, its worker a sleep.
func TestKillTakesBoth(t *testing.T) {
	keeper := exec.Command("sh", "-c", "sleep 1000 & echo $!; wait")
	out, err := keeper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 32)
	n, err := out.Read(text)
	worker, _ := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil || worker <= 1 {
		t.Fatalf("%q: %v", text[:n], err)
	}
	fd, err := unix.PidfdOpen(worker, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	kill(keeper)
	if !keeper.ProcessState.Exited() && keeper.ProcessState.String() != "signal: killed" {
		t.Errorf("the keeper: %v", keeper.ProcessState)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 30_000); n != 1 {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		t.Errorf("the worker lives: %v", err)
	}
}
