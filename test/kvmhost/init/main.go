// Command init is process 1 of the emulated host: see package kvmhost. Everything it needs is in the initramfs.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"ftclock/test/kvmhost/protocol"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Args[0] == agentName {
		agent()
		return
	}
	control, err := begin()
	if err != nil {
		fmt.Println("ftclock: the emulated host doesn't come up:", err) // the kernel's console
		end()
	}
	say := &speaker{to: json.NewEncoder(control)}
	heard := json.NewDecoder(control)
	code, err := serve(control, say, heard)
	if err != nil {
		_ = say.say(protocol.Progress{Error: err.Error()})
	} else {
		_ = say.say(protocol.Progress{Exit: &code})
	}
	end()
}

// speaker is the control port's way out.
type speaker struct {
	mu sync.Mutex
	to *json.Encoder
}

func (s *speaker) say(p protocol.Progress) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.to.Encode(p)
}

// end switches the host off.
func end() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// begin loads the modules and opens the control port.
func begin() (control *os.File, err error) {
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return nil, err
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return nil, err
	}
	for _, name := range strings.Fields(string(order)) {
		// One of kvm-amd and kvm-intel is another processor's; whether there is a /dev/kvm is seen later.
		if err := load(name); err != nil && !strings.HasPrefix(name, "kvm-") {
			return nil, fmt.Errorf("loading %s: %w", name, err)
		}
	}
	return port(protocol.Control)
}

func load(name string) error {
	module, err := os.Open("/modules/" + name)
	if err != nil {
		return err
	}
	defer module.Close()
	parameters := ""
	if name == "kvm-amd.ko" {
		parameters = "npt=1 nested=0"
	}
	return unix.FinitModule(int(module.Fd()), parameters, 0)
}

func mount(source, at, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, at, kind, flags, data); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", kind, at, err)
	}
	return nil
}

// port opens a virtio serial port by its name.
func port(name string) (*os.File, error) {
	for range 500 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, file := range names {
			if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no virtio serial port %s", name)
}

// serve runs the command and gives its exit code.
func serve(control *os.File, say *speaker, heard *json.Decoder) (int, error) {
	var job protocol.Job
	if err := heard.Decode(&job); err != nil {
		return 0, fmt.Errorf("reading the command: %w", err)
	}
	if job.Init != "" {
		return 0, handOver(control, job)
	}
	streams, err := open(job)
	if err != nil {
		return 0, err
	}
	if err := fileSystems(job); err != nil {
		return 0, err
	}
	up, err := settle()
	if err != nil {
		return 0, err
	}
	if err := say.say(protocol.Progress{Up: up}); err != nil {
		return 0, err
	}
	return run(job, streams, heard, beats(say))
}

// beats gives what asks for a beat: every processor runs a program, and the machine is told so. One that hangs may leave the others at
// work for a while.
func beats(say *speaker) (ask func()) {
	asked := make(chan struct{}, 1)
	go beat(say, asked)
	return func() {
		select {
		case asked <- struct{}{}:
		default: // the last one is under way
		}
	}
}

func beat(say *speaker, asked <-chan struct{}) {
	var all unix.CPUSet // runtime.NumCPU would be of the time when this program began
	if unix.SchedGetaffinity(0, &all) != nil {
		return
	}
	turns := make([]chan struct{}, all.Count())
	for cpu := range turns {
		turns[cpu] = make(chan struct{})
		go func() {
			runtime.LockOSThread()
			var one unix.CPUSet
			one.Set(cpu)
			if unix.SchedSetaffinity(0, &one) != nil {
				return
			}
			for range turns[cpu] {
			}
		}()
	}
	for range asked {
		for _, turn := range turns {
			turn <- struct{}{}
			turn <- struct{}{} // taken when that processor has run it since the first
		}
		if say.say(protocol.Progress{Beat: true}) != nil {
			return
		}
	}
}

// open opens the command's standard streams, while /dev is where the kernel put it.
func open(job protocol.Job) (streams [3]*os.File, err error) {
	if job.Terminal {
		console, err := os.OpenFile("/dev/hvc0", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return streams, err
		}
		_ = unix.IoctlSetWinsize(int(console.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: job.Rows, Col: job.Columns})
		return [3]*os.File{console, console, console}, nil
	}
	for i, name := range []string{protocol.Stdin, protocol.Stdout, protocol.Stderr} {
		if streams[i], err = port(name); err != nil {
			return streams, err
		}
	}
	return streams, nil
}

// fileSystems makes the machine's / this one's, with a tmpfs above it.
func fileSystems(job protocol.Job) error {
	const options = "trans=virtio,version=9p2000.L,msize=512000,cache="
	if job.Disk {
		for range 500 { // the kernel finds it in its own time
			if _, err := os.Stat(protocol.Disk); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	var err error
	if job.OnDisk {
		err = mount(protocol.Disk, "/root", "ext4", 0, "")
	} else {
		err = overlay(job, options+"loose")
	}
	if err != nil {
		return err
	}
	// What is written to may lie below what is only read.
	for i, dir := range job.Read {
		if err := mount(protocol.RootTag+strconv.Itoa(len(job.Write)+i), "/root"+dir, "9p", unix.MS_RDONLY, options+"loose"); err != nil {
			return err
		}
	}
	for i, dir := range job.Write {
		if err := mount(protocol.RootTag+strconv.Itoa(i), "/root"+dir, "9p", 0, options+"none"); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll("/root"+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, "/root"+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s: %w", dir, err)
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return os.NewSyscallError("chroot", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if job.Init != "" {
		return nil // it makes its own
	}
	return ownFileSystems(job)
}

// overlay mounts the machine's root, or an image, with what the host writes above it.
func overlay(job protocol.Job, options string) error {
	if err := mount(protocol.RootTag, "/machine", "9p", unix.MS_RDONLY, options); err != nil {
		return err
	}
	var err error
	if job.Disk {
		err = mount(protocol.Disk, "/above", "ext4", 0, "")
	} else {
		err = mount("above", "/above", "tmpfs", 0, "size=80%,mode=0755")
	}
	if err != nil {
		return err
	}
	for _, dir := range []string{"/above/upper", "/above/work"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return mount("overlay", "/root", "overlay", 0, "lowerdir=/machine,upperdir=/above/upper,workdir=/above/work")
}

// ownFileSystems are those that a host has for itself.
func ownFileSystems(job protocol.Job) error {
	for _, m := range []struct{ kind, at, options string }{
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"devpts", "/dev/pts", "ptmxmode=666,mode=620,gid=5"},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if under(job, m.at) {
			continue // the tree that the command works in lies there
		}
		if err := mount(m.kind, m.at, m.kind, 0, m.options); err != nil {
			return err
		}
	}
	_ = mount("securityfs", "/sys/kernel/security", "securityfs", 0, "") // not every kernel has it
	_ = os.MkdirAll("/run/lock", 0o755)
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		_ = os.Symlink(target, "/dev/"+name)
	}
	return os.Chmod("/tmp", 0o777|os.ModeSticky)
}

func under(job protocol.Job, dir string) bool {
	for _, path := range append([]string{job.Dir}, job.Write...) {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			return true
		}
	}
	return false
}

// settle does the rest of what a distribution's boot does, and looks whether this is a KVM host.
func settle() (*protocol.Up, error) {
	if err := unix.Sethostname([]byte("emulated")); err != nil {
		return nil, os.NewSyscallError("sethostname", err)
	}
	// libvirt looks its host's name up with each domain.
	if hosts, err := os.OpenFile("/etc/hosts", os.O_APPEND|os.O_WRONLY, 0); err == nil {
		fmt.Fprintln(hosts, "127.0.1.1 emulated")
		hosts.Close()
	}
	if err := network("lo", ""); err != nil {
		return nil, err
	}
	return up()
}

// network switches an interface on, with an address and the /24 network around it where one is given.
func network(name, address string) error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(sock)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if address != "" {
		for _, set := range []struct {
			what uint
			to   net.IP
		}{{unix.SIOCSIFADDR, net.ParseIP(address)}, {unix.SIOCSIFNETMASK, net.IPv4(255, 255, 255, 0)}} {
			if err := errors.Join(r.SetInet4Addr(set.to.To4()), unix.IoctlIfreq(sock, set.what, r)); err != nil {
				return fmt.Errorf("giving %s the address %s: %w", name, address, err)
			}
		}
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("switching on the interface %s: %w", name, err)
	}
	return nil
}

// up looks whether this is a KVM host.
func up() (*protocol.Up, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("the kernel has no KVM in it: %w", err)
	}
	defer kvm.Close()
	if err := errors.Join(keepVM(kvm), allProcessors()); err != nil {
		return nil, err
	}
	if err := os.Chmod("/dev/kvm", 0o666); err != nil {
		return nil, err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	source, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return nil, err
	}
	up := &protocol.Up{Kernel: unix.ByteSliceToString(name.Release[:]), ClockSource: strings.TrimSpace(string(source))}
	if text, err := os.ReadFile("/proc/uptime"); err == nil {
		up.Seconds, _ = strconv.ParseFloat(strings.Fields(string(text))[0], 64)
	}
	return up, nil
}

// keepVM keeps a virtual machine with a processor that never runs for as long as the host does. With the first machine that
// begins, and the last one that ends, the kernel patches its scheduler (the static key preempt_notifier_key); with the first
// and the last processor whose APIC is switched off, as each one's is at its reset, much of its APIC (apic_sw_disabled). Under
// TCG with several threads a processor may go on with the breakpoint that stood there meanwhile: it then takes it for ever,
// with interrupts off, and the host hangs. Seen with QEMU 7.2 and Linux 6.1 once in some ten minutes of starting and ending
// domains.
func keepVM(kvm *os.File) error {
	// Of the kernel's include/uapi/linux/kvm.h.
	const createVM, createIRQChip, createVCPU = 0xae01, 0xae60, 0xae41
	vm, _, errno := unix.Syscall(unix.SYS_IOCTL, kvm.Fd(), createVM, 0)
	for errno == unix.EINTR { // the runtime's own signal to preempt a goroutine does it
		vm, _, errno = unix.Syscall(unix.SYS_IOCTL, kvm.Fd(), createVM, 0)
	}
	if errno != 0 {
		return os.NewSyscallError("ioctl KVM_CREATE_VM", errno)
	}
	unix.CloseOnExec(int(vm))
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, vm, createIRQChip, 0); errno != 0 {
		return os.NewSyscallError("ioctl KVM_CREATE_IRQCHIP", errno)
	}
	vcpu, _, errno := unix.Syscall(unix.SYS_IOCTL, vm, createVCPU, 0)
	if errno != 0 {
		return os.NewSyscallError("ioctl KVM_CREATE_VCPU", errno)
	}
	unix.CloseOnExec(int(vcpu))
	return nil
}

// allProcessors switches on those beside the first one. Until here the kernel has had that one alone, by maxcpus=1: while it begins
// and loads modules it patches itself a thousand times, and what keepVM says of patching holds from the beginning: Linux 7.2
// on QEMU 7.2 has panicked there.
func allProcessors() error {
	switches, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/online")
	if err != nil {
		return err
	}
	for _, s := range switches {
		if err := os.WriteFile(s, []byte("1"), 0); err != nil {
			return fmt.Errorf("switching on a processor: %w", err)
		}
	}
	return nil
}

// run runs the command to its end, passing signals on, and reaps everybody else's children.
func run(job protocol.Job, streams [3]*os.File, heard *json.Decoder, askBeat func()) (int, error) {
	for _, v := range job.Env { // exec.Command looks for the program there
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
	cmd := exec.Command(job.Args[0], job.Args[1:]...)
	cmd.Dir, cmd.Env = job.Dir, job.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var copied sync.WaitGroup
	var written []*os.File
	if job.Terminal {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = streams[0], streams[1], streams[2]
		cmd.SysProcAttr.Setctty = true
	} else {
		// Pipes: a virtio port can be open once only, and programs open /dev/stdout.
		in, theirs, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		cmd.Stdin = in
		go func() {
			_, _ = io.Copy(theirs, streams[0])
			theirs.Close()
		}()
		written = append(written, in)
		for i, to := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
			ours, theirs, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			*to = theirs
			written = append(written, theirs)
			copied.Go(func() { _, _ = io.Copy(streams[1+i], ours) })
		}
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	for _, f := range written {
		f.Close()
	}
	go func() {
		for {
			var s protocol.Signal
			if heard.Decode(&s) != nil {
				return
			}
			if s.Number == 0 {
				askBeat()
				continue
			}
			_ = unix.Kill(-cmd.Process.Pid, unix.Signal(s.Number))
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("wait4", err)
		case pid == cmd.Process.Pid:
			wait(&copied)
			return protocol.ExitCode(status), nil
		}
	}
}

// wait waits for what the command has written, but not for a daemon that it left behind with its streams open.
func wait(copied *sync.WaitGroup) {
	done := make(chan struct{})
	go func() {
		copied.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
	}
}
