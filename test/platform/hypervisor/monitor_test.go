// Needed by: the hook and the shim. libvirt makes the monitor's socket itself,
// before `start begin` and not before `prepare begin`, and gives QEMU the
// listening descriptor; so the socket can be renamed and another put in its
// place. libvirt connects once, without a second try, so that the shim must
// listen when the hook returns; and it connects again after its own restart.
// The peer's credentials on QEMU's socket are libvirtd's, so that QEMU must be
// found by its pid file and proved by the socket's inode.

package hypervisor

import (
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
)

const (
	hookVariable  = "FTCLOCK_PLATFORM_HOOK"
	relayVariable = "FTCLOCK_PLATFORM_RELAY"

	hookLog        = privatelibvirt.Dir + "/hook.log"
	connectionsLog = privatelibvirt.Dir + "/connections.log"
)

// installHook makes this program a hook of the private libvirt.
func installHook() error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	program := filepath.Join(privatelibvirt.Dir, "platform.test")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		return err
	}
	script := "#!/bin/sh\n" + hookVariable + "=1 exec " + program + ` "$@"` + "\n"
	return os.WriteFile(filepath.Join(privatelibvirt.HooksDir, "50-platform"), []byte(script), 0o755)
}

// hook runs in libvirtd's place for a script: NAME OPERATION SUB-OPERATION -,
// the domain on standard input.
func hook() int {
	name, operation := os.Args[1], os.Args[2]+" "+os.Args[3]
	if name != "moved" && name != "unserved" {
		return 0
	}
	if err := func() error {
		var domain struct {
			ID string `xml:"id,attr"`
		}
		text, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		if err := xml.Unmarshal(text, &domain); err != nil {
			return err
		}
		sockets, err := filepath.Glob("/var/lib/libvirt/qemu/domain-" + domain.ID + "-*/monitor.sock")
		if err != nil {
			return err
		}
		if err := appendLine(hookLog, fmt.Sprintf("%s %s: %d", name, operation, len(sockets))); err != nil {
			return err
		}
		if operation != "start begin" {
			return nil
		}
		if len(sockets) != 1 {
			return fmt.Errorf("sockets of domain %s: %q", domain.ID, sockets)
		}
		moved := filepath.Join(filepath.Dir(sockets[0]), "qemu.sock")
		if err := os.Rename(sockets[0], moved); err != nil {
			return err
		}
		if name == "unserved" {
			return nil
		}
		listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: sockets[0]})
		if err != nil {
			return err
		}
		file, err := listener.File()
		if err != nil {
			return err
		}
		relay := exec.Command("/proc/self/exe")
		relay.Env = append(os.Environ(), relayVariable+"="+moved, hookVariable+"=")
		relay.ExtraFiles = []*os.File{file}
		relay.SysProcAttr = &unix.SysProcAttr{Setsid: true}
		return relay.Start()
	}(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// relay passes bytes between libvirt and QEMU, one client after the other.
func relay(moved string) int {
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return 1
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			return 1
		}
		qemu, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: moved})
		if err != nil {
			return 1
		}
		raw, err := qemu.SyscallConn()
		if err != nil {
			return 1
		}
		var peer *unix.Ucred
		raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err != nil || appendLine(connectionsLog, fmt.Sprint(peer.Pid)) != nil {
			return 1
		}
		qemuGone := make(chan bool, 2)
		go func() {
			_, err := io.Copy(client, qemu)
			qemuGone <- err == nil
		}()
		go func() {
			io.Copy(qemu, client)
			qemuGone <- false
		}()
		if <-qemuGone {
			return 0
		}
		qemu.Close()
		client.Close()
	}
}

func appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, line)
	return err
}

func lines(t *testing.T, path string) []string {
	t.Helper()
	text := check.Value(os.ReadFile(path))(t)
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func define(t *testing.T, name string) *privatelibvirt.Domain {
	t.Helper()
	d := check.Value(privatelibvirt.Define(conn, privatelibvirt.GuestXML(name, elf)))(t)
	return d
}

func TestKVMMonitorSocketCanBeMoved(t *testing.T) {
	d := define(t, "moved")
	if err := d.Create(); err != nil {
		t.Fatal(err, privatelibvirt.Log("moved"))
	}
	want := []string{"moved prepare begin: 0", "moved start begin: 1"}
	if got := lines(t, hookLog); !slices.Equal(got[:min(2, len(got))], want) {
		t.Errorf("sockets at the hook's calls: %q, not %q", got, want)
	}
	command := func() {
		t.Helper()
		out, err := privatelibvirt.Virsh("qemu-monitor-command", "moved", `{"execute":"query-status"}`)
		if err != nil || !strings.Contains(out, `"running"`) {
			t.Errorf("monitor: %v\n%s", err, out)
		}
	}
	command()
	libvirtd := fmt.Sprint(privatelibvirt.PID())
	if got := lines(t, connectionsLog); !slices.Equal(got, []string{libvirtd}) {
		t.Errorf("peers of QEMU's monitor: %q, not one, which is libvirtd, %s", got, libvirtd)
	}

	// The socket belongs to QEMU by its inode.
	pid := check.Value(d.PID())(t)
	open := map[string]bool{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, link := range links {
		to, _ := os.Readlink(link)
		open[to] = true
	}
	held := 0
	for _, line := range lines(t, fmt.Sprintf("/proc/%d/net/unix", pid)) {
		// Num RefCount Protocol Flags Type St Inode Path; the path stays that of bind.
		f := strings.Fields(line)
		if len(f) == 8 && f[3] == "00010000" && strings.HasSuffix(f[7], "/monitor.sock") && open["socket:["+f[6]+"]"] {
			held++
		}
	}
	if held != 1 {
		t.Errorf("QEMU listens on %d monitors", held)
	}

	// libvirtd's restart.
	conn.Close()
	check.NoError(t, privatelibvirt.Stop())
	check.NoError(t, privatelibvirt.Start())
	conn = check.Value(privatelibvirt.Connect())(t)
	command()
	if got := lines(t, connectionsLog); len(got) != 2 {
		t.Errorf("connections after libvirtd's restart: %q", got)
	}
	for _, arguments := range [][]string{{"destroy", "moved"}, {"undefine", "moved"}} {
		if out, err := privatelibvirt.Virsh(arguments...); err != nil {
			t.Error(out, err)
		}
	}
}

func TestKVMLibvirtConnectsWithoutASecondTry(t *testing.T) {
	d := define(t, "unserved")
	defer d.Undefine()
	err := d.Create()
	if err == nil {
		d.Destroy()
		t.Fatal("domain started although nobody listened on its monitor")
	}
	t.Log(err)
	if !strings.Contains(err.Error(), "monitor") {
		t.Errorf("domain whose monitor nobody serves: %v", err)
	}
}
