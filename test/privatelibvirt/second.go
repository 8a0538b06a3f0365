package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// secondUUID tells libvirt that it is on another host, and everybody that it is another boot.
const secondUUID = "0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9"

// bootID is where the kernel tells its boots apart.
const bootID = "/proc/sys/kernel/random/boot_id"

// second are the directories that the second host has of its own. All exist on the first one.
var second = []string{"/etc/libvirt", "/run/libvirt", "/run/ftclock", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"}

// first is where the second host finds the first one's sockets.
const first = Dir + "/first"

// FirstURI is where the second libvirt finds the first one.
const FirstURI = "qemu+unix:///system?socket=" + first + "/libvirt-sock"

// The hosts' addresses on the network between them.
const (
	FirstAddress  = "192.0.2.1"
	SecondAddress = "192.0.2.2"
)

// Second is a second libvirt with a host's name, a boot's id, a network and
// directories of its own, to migrate to. Its processes are in this process's namespace of
// processes; its sockets are reached below Dir.
type Second struct {
	Dir string // its /run is Dir/run, and so on for the other directories of its own
	URI string
	d   *daemon
}

// StartSecond starts the second libvirt, with the hooks of the first one and
// further lines for its qemu.conf, and waits until it answers. The caller ends
// it by Stop, without domains.
func StartSecond(qemuConf ...string) (*Second, error) {
	if !Inside() {
		return nil, errors.New("starting a second libvirtd: not inside the private libvirt")
	}
	s := &Second{Dir: filepath.Join(Dir, "second")}
	s.URI = "qemu+unix:///system?socket=" + s.Dir + "/run/libvirt/libvirt-sock"
	script := "set -e\necho second >/proc/sys/kernel/hostname\nmount --bind /run/libvirt '" + first + "'\n"
	// A guest's console lies beside QEMU's logs, in a directory that libvirt makes only with the first of these.
	for _, dir := range []string{first, s.Dir + "/var/log/libvirt/qemu"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("starting a second libvirtd: %w", err)
		}
	}
	for _, dir := range second {
		for _, d := range []string{dir, s.Dir + dir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return nil, fmt.Errorf("starting a second libvirtd: %w", err)
			}
		}
		script += "mount --bind '" + s.Dir + dir + "' '" + dir + "'\n"
	}
	boot := s.Dir + "/boot_id"
	if err := os.WriteFile(boot, []byte(secondUUID+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("starting a second libvirtd: %w", err)
	}
	script += "mount --bind '" + boot + "' " + bootID + "\n"
	if out, err := exec.Command("cp", "-a", "/etc/libvirt/.", s.Dir+"/etc/libvirt").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("starting a second libvirtd: copying its configuration: %w: %s", err, out)
	}
	for name, lines := range map[string]string{
		"libvirtd.conf": "host_uuid = \"" + secondUUID + "\"\n",
		"qemu.conf":     strings.Join(append(qemuConf, "stdio_handler = \"file\"\n"), "\n"), // virtlogd is the first one's
	} {
		path := s.Dir + "/etc/libvirt/" + name
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, append([]byte(lines), text...), 0o644)
		}
		if err != nil {
			return nil, fmt.Errorf("starting a second libvirtd: %w", err)
		}
	}
	path, err := program("libvirtd")
	if err != nil {
		return nil, err
	}
	out, err := os.Create("/var/log/libvirtd-second.out")
	if err != nil {
		return nil, err
	}
	defer out.Close()
	s.d = &daemon{cmd: exec.Command("/bin/sh", "-c", script+"exec '"+path+"' --pid-file '"+s.Dir+"/libvirtd.pid'\n"), dead: make(chan struct{})}
	s.d.cmd.Stdout, s.d.cmd.Stderr, s.d.cmd.Dir = out, out, "/"
	s.d.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWNET}
	if err := s.d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a second libvirtd: %w", err)
	}
	go func() {
		_ = s.d.cmd.Wait()
		close(s.d.dead)
	}()
	if err := s.network(); err != nil {
		_ = s.Stop()
		return nil, fmt.Errorf("starting a second libvirtd: %w", err)
	}
	for end := time.Now().Add(startTimeout); ; time.Sleep(50 * time.Millisecond) {
		conn, err := s.Connect()
		if err == nil {
			_, err = conn.Close()
			return s, err
		}
		select {
		case <-s.d.dead:
		default:
			if time.Now().Before(end) {
				continue
			}
		}
		_ = s.Stop()
		log, _ := os.ReadFile(s.Dir + LogPath)
		own, _ := os.ReadFile(out.Name())
		return nil, fmt.Errorf("starting a second libvirtd: %w\n%s%s", err, tail(log, 20), tail(own, 20))
	}
}

// Command is a command on the second host, in which qemu:///system is its libvirt.
func (s *Second) Command(name string, args ...string) *exec.Cmd {
	pid := strconv.Itoa(s.d.cmd.Process.Pid)
	return exec.Command("nsenter", append([]string{"-t", pid, "-m", "-u", "-n", "--", name}, args...)...)
}

// network lays a cable between the hosts. It goes with the second one's
// network.
func (s *Second) network() error {
	pid := strconv.Itoa(s.d.cmd.Process.Pid)
	// The kernel takes down the network of one that has ended when it comes to it.
	_ = exec.Command("ip", "link", "delete", "to-second").Run()
	for _, args := range [][]string{
		{"ip", "link", "add", "to-second", "type", "veth", "peer", "name", "to-first", "netns", pid},
		{"ip", "address", "add", FirstAddress + "/24", "dev", "to-second"},
		{"ip", "link", "set", "to-second", "up"},
		{"nsenter", "-t", pid, "-n", "ip", "address", "add", SecondAddress + "/24", "dev", "to-first"},
		{"nsenter", "-t", pid, "-n", "ip", "link", "set", "to-first", "up"},
		{"nsenter", "-t", pid, "-n", "ip", "link", "set", "lo", "up"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("connecting it: %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// Connect connects to the second libvirt.
func (s *Second) Connect() (*libvirt.Connect, error) { return libvirt.NewConnect(s.URI) }

// Stop ends the second libvirt.
func (s *Second) Stop() error {
	_ = s.d.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-s.d.dead:
		return nil
	case <-time.After(startTimeout):
		return errors.New("stopping the second libvirtd: SIGTERM had no effect")
	}
}
