package privatelibvirt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
)

// secondUUID tells libvirt that it is on another host.
const secondUUID = "0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9"

// second are the directories that the second host has of its own. All exist on the first one.
var second = []string{"/etc/libvirt", "/run/libvirt", "/run/ftclock", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"}

// Second is a second libvirt with a host's name, a network and directories of
// its own, to migrate to. Its processes are in this process's namespace of
// processes; its sockets are reached below Dir.
type Second struct {
	Dir string // its /run is Dir/run, and so on for the other directories of its own
	URI string
	d   *daemon
}

// StartSecond starts the second libvirt, with the hooks of the first one, and
// waits until it answers. The caller ends it by Stop, without domains.
func StartSecond() (*Second, error) {
	if !Inside() {
		return nil, errors.New("starting a second libvirtd: not inside the private libvirt")
	}
	s := &Second{Dir: filepath.Join(Dir, "second")}
	s.URI = "qemu+unix:///system?socket=" + s.Dir + "/run/libvirt/libvirt-sock"
	script := "set -e\necho second >/proc/sys/kernel/hostname\n"
	for _, dir := range second {
		for _, d := range []string{dir, s.Dir + dir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return nil, fmt.Errorf("starting a second libvirtd: %w", err)
			}
		}
		script += "mount --bind '" + s.Dir + dir + "' '" + dir + "'\n"
	}
	if out, err := exec.Command("cp", "-a", "/etc/libvirt/.", s.Dir+"/etc/libvirt").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("starting a second libvirtd: copying its configuration: %w: %s", err, out)
	}
	for name, lines := range map[string]string{
		"libvirtd.conf": "host_uuid = \"" + secondUUID + "\"\n",
		"qemu.conf":     "stdio_handler = \"file\"\n", // virtlogd is the first one's
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
