package kvmhost

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"ftclock/test/built"
	"ftclock/test/kvmhost/protocol"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Variable says where a command runs: "native" on this machine, "emulated" on an emulated host. Without it, on this machine
// where that has /dev/kvm.
const Variable = "FTCLOCK_HOST"

// GuestKernelVariable names the kernel that Linux guests boot: a vmlinuz or a vmlinux.
const GuestKernelVariable = "FTCLOCK_TEST_KERNEL"

// EmulatedVariable is "1" in the environment of what runs on an emulated host.
const EmulatedVariable = "FTCLOCK_EMULATED"

// What an emulated host can do with.
const (
	leastMemory = 3 << 10 // MiB
	mostMemory  = 8 << 10 // MiB
	leastDisk   = 1 << 30 // bytes below build/, for the kernel's package and its modules
	cpus        = 2
)

// ErrHost says that the emulated host itself stood still or crashed, whatever ran on it. It is the emulator's fault, not that
// of what runs on the host.
var ErrHost = errors.New("the emulated host failed")

// hangs is the time without a beat after which a host is taken for one that hangs: a starved machine may be late by much.
const hangs = 2 * time.Minute

// bootPatience bounds the time until the host is up; 10 s are usual.
const bootPatience = 5 * time.Minute

// Options are what runs of a command can differ in.
type Options struct {
	// Suite names the Debian whose kernel the host has: bookworm, trixie, sid. "" is this machine's.
	Suite string
	// Root is the directory of a whole Debian whose libvirt and QEMU the command has, beside the tree that it is called in.
	// "" is this machine's own. It is for emulated hosts only.
	Root string
	// Append are further arguments of the kernel's.
	Append string
	// Write are directories that the command shares with this machine. What it writes elsewhere is gone with the host.
	Write []string
	// Timeout takes the host away. 0: none.
	Timeout time.Duration
	// Terminal gives the command this program's terminal.
	Terminal bool
}

// Emulated tells whether this program runs on an emulated host.
func Emulated() bool { return os.Getenv(EmulatedVariable) == "1" }

// Native tells whether commands run on this machine. It fails where Variable is neither of its values, or asks for what
// isn't there.
func Native() (bool, error) {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(kvm)
	}
	switch value := os.Getenv(Variable); value {
	case "":
		return err == nil, nil
	case "native":
		if err != nil {
			return false, fmt.Errorf("%s=native, but /dev/kvm: %w; fix: modprobe kvm_intel or kvm_amd, or leave %s out", Variable, err, Variable)
		}
		return true, nil
	case "emulated":
		return false, nil
	default:
		return false, fmt.Errorf("%s=%s; fix: native, emulated, or leave it out", Variable, value)
	}
}

// Run runs a command on a KVM host with this program's standard streams, and gives its exit code as a shell does.
func Run(o Options, args ...string) (int, error) {
	native, err := Native()
	if err != nil {
		return 0, err
	}
	if native && o.Root != "" {
		return 0, fmt.Errorf("a host with the programs of %s is an emulated one; fix: %s=emulated", o.Root, Variable)
	}
	if native {
		return o.native(args)
	}
	return o.emulated(args)
}

func (o Options) native(args []string) (int, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var late <-chan time.Time
	if o.Timeout > 0 {
		late = time.After(o.Timeout)
	}
	for {
		select {
		case s := <-signals:
			if s != unix.SIGINT { // the keyboard's comes to the whole process group
				_ = cmd.Process.Signal(s)
			}
		case <-late:
			_ = cmd.Process.Kill()
			<-ended
			return 0, fmt.Errorf("%s didn't end within %v", args[0], o.Timeout)
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return 0, err
			}
			return protocol.ExitCode(cmd.ProcessState.Sys().(syscall.WaitStatus)), nil
		}
	}
}

// emulated boots a host for the command.
func (o Options) emulated(args []string) (int, error) {
	root, err := built.Root()
	if err != nil {
		return 0, err
	}
	dir := filepath.Join(root, "build/host")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	memory, err := lacks(dir)
	if err != nil {
		return 0, err
	}
	f, err := prepare(dir, o.Suite)
	if err != nil {
		return 0, err
	}
	job, err := o.job(args, f)
	if err != nil {
		return 0, err
	}
	machine := machineOptions{kernel: f, memory: memory, append: o.Append, root: "/", write: job.Write, terminal: o.Terminal}
	if o.Root != "" {
		machine.root, machine.read, job.Read = o.Root, []string{root}, []string{root}
	}
	m, err := boot(machine)
	if err != nil {
		return 0, err
	}
	defer m.end()
	say("this machine has no /dev/kvm that is to be used: booting an emulated KVM host")
	return m.serve(job, o.Timeout)
}

// lacks says what this machine lacks for an emulated host, and how much memory, in MiB, it has for one.
func lacks(dir string) (memory int, err error) {
	out, err := exec.Command("qemu-system-x86_64", "--version").Output()
	if err != nil {
		return 0, errors.New("an emulated host needs qemu-system-x86_64; fix: apt-get install qemu-system-x86")
	}
	// SVM with nested paging that a stock kernel takes, and sockets that are handed over: tried with 7.2.
	if version := regexp.MustCompile(`version (\d+)\.(\d+)`).FindStringSubmatch(string(out)); version != nil {
		if major, _ := strconv.Atoi(version[1]); major < 7 {
			return 0, fmt.Errorf("QEMU %s.%s is too old to emulate a KVM host; fix: QEMU 7.2 or later, as in Debian 12", version[1], version[2])
		}
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err != nil {
		return 0, os.NewSyscallError("statfs", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "kernel/vmlinuz")); err != nil && disk.Bavail*uint64(disk.Bsize) < leastDisk {
		return 0, fmt.Errorf("%s has room for %d MiB, an emulated host needs %d; fix: make room there", dir, disk.Bavail*uint64(disk.Bsize)>>20, leastDisk>>20)
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return memoryFor(text, memoryLimit())
}

// memoryLimit is what this program may use of the machine's memory, in KiB: control groups of either version say so in their
// places, which for a container are the top ones.
func memoryLimit() int {
	least := math.MaxInt
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		dir, file := "/sys/fs/cgroup", "memory.max"
		if fields[1] == "memory" {
			dir, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		for _, group := range []string{"/", fields[2]} {
			text, _ := os.ReadFile(filepath.Join(dir, group, file))
			if limit, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil { // not "max"
				least = min(least, limit>>10)
			}
		}
	}
	return least
}

// memoryFor is how much memory a host gets, in MiB, on a machine with that /proc/meminfo, of which limit KiB may be used.
func memoryFor(text []byte, limit int) (memory int, err error) {
	available := regexp.MustCompile(`MemAvailable: +(\d+) kB`).FindSubmatch(text)
	if available == nil {
		return 0, errors.New("/proc/meminfo has no MemAvailable")
	}
	kib, _ := strconv.Atoi(string(available[1]))
	fix := "end something"
	if limit < kib {
		kib, fix = limit, "let this control group or container have more"
	}
	if memory = min(mostMemory, kib>>10*3/4); memory < leastMemory {
		return 0, fmt.Errorf("%d MiB of memory are available, an emulated host needs %d; fix: %s", kib>>10, leastMemory*4/3, fix)
	}
	return memory, nil
}

// job is what the host is told. It has this program's environment.
func (o Options) job(args []string, f *files) (*protocol.Job, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	job := &protocol.Job{Args: args, Dir: dir, Terminal: o.Terminal}
	own := []string{EmulatedVariable + "=", Variable + "="}
	for _, v := range os.Environ() {
		if !slices.ContainsFunc(own, func(name string) bool { return strings.HasPrefix(v, name) }) {
			job.Env = append(job.Env, v)
		}
	}
	job.Env = append(job.Env, EmulatedVariable+"=1", Variable+"=native")
	if os.Getenv(GuestKernelVariable) == "" {
		job.Env = append(job.Env, GuestKernelVariable+"="+f.kernel) // the guests of the host boot the same
	}
	for _, w := range o.Write {
		path, err := filepath.Abs(w)
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
		job.Write = append(job.Write, path)
	}
	if o.Terminal {
		if columns, rows, err := term.GetSize(int(os.Stdin.Fd())); err == nil {
			job.Rows, job.Columns = uint16(rows), uint16(columns)
		}
	}
	return job, nil
}

// machine is an emulated host that runs.
type machine struct {
	qemu    *exec.Cmd
	ended   chan struct{} // closed when QEMU has ended
	scratch string
	control *os.File
	streams [3]*os.File // the command's; none with a terminal
}

// machineOptions are what QEMU is started with.
type machineOptions struct {
	kernel      *files
	memory      int // MiB
	append      string
	root        string   // directory of the file system that the host has below its own; "" where its disk has all
	write, read []string // directories that it shares, see protocol.Job
	disk        string   // file, "" for none
	terminal    bool
	more        []string // further arguments of QEMU's
	nested      bool     // by the machine's own KVM, and its guests by nested virtualization
}

// boot starts QEMU.
func boot(o machineOptions) (_ *machine, err error) {
	m := &machine{ended: make(chan struct{})}
	if m.scratch, err = os.MkdirTemp("", "ftclock-host-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.end()
		}
	}()
	// Page tables of five levels, where there are nested ones, take a tenth of an emulated processor's time.
	accelerator, processor := "tcg,thread=multi,tb-size=512", "max,la57=off"
	if o.nested {
		accelerator, processor = "kvm", "host"
	}
	// The kernel counts ticks of the timer for some ms when it boots, and panics where a busy machine has it see none.
	const timer = "no_timer_check "
	args := []string{
		"-name", "host,debug-threads=on", "-machine", "q35", "-accel", accelerator, "-cpu", processor, "-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(o.memory),
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "file:" + filepath.Join(m.scratch, "console"),
		"-monitor", "unix:" + filepath.Join(m.scratch, "monitor") + ",server=on,wait=off", "-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci,max_ports=8", "-kernel", o.kernel.kernel, "-initrd", o.kernel.initramfs,
		"-append", "console=ttyS0 quiet panic=-1 maxcpus=1 mitigations=off tsc=reliable clocksource=tsc " + timer + o.append,
	}
	share := func(tag, path, more string) {
		args = append(args, "-fsdev", "local,security_model=none,id="+tag+",path="+path+more, "-device", "virtio-9p-pci,fsdev="+tag+",mount_tag="+tag)
	}
	if o.root != "" {
		share(protocol.RootTag, o.root, ",readonly=on,multidevs=remap")
	}
	for i, dir := range o.write {
		share(protocol.RootTag+strconv.Itoa(i), dir, "")
	}
	for i, dir := range o.read {
		share(protocol.RootTag+strconv.Itoa(len(o.write)+i), dir, ",readonly=on,multidevs=remap")
	}
	if o.disk != "" {
		args = append(args, "-drive", "file="+o.disk+",format=raw,if=virtio,cache=writeback")
	}
	args = append(args, o.more...)
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	port := func(name string) (*os.File, error) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, os.NewSyscallError("socketpair", err)
		}
		theirs = append(theirs, os.NewFile(uintptr(pair[1]), name))
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", name, 2+len(theirs)), "-device", "virtserialport,chardev="+name+",name="+name)
		return os.NewFile(uintptr(pair[0]), name), nil
	}
	if m.control, err = port(protocol.Control); err != nil {
		return nil, err
	}
	if o.terminal {
		args = append(args, "-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal")
	} else {
		for i, name := range []string{protocol.Stdin, protocol.Stdout, protocol.Stderr} {
			if m.streams[i], err = port(name); err != nil {
				return nil, err
			}
		}
	}
	// Every file that the host has open is one of QEMU's.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	m.qemu = exec.Command("qemu-system-x86_64", args...)
	m.qemu.ExtraFiles = theirs
	// A Ctrl-C is passed on to the command, not to QEMU; with this program QEMU goes, too.
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: !o.terminal, Pdeathsig: unix.SIGKILL}
	if o.terminal {
		m.qemu.Stdin, m.qemu.Stdout = os.Stdin, os.Stdout
	}
	said, err := os.Create(filepath.Join(m.scratch, "qemu"))
	if err != nil {
		return nil, err
	}
	defer said.Close()
	m.qemu.Stderr = said
	if err := m.start(); err != nil {
		return nil, err
	}
	return m, nil
}

// start starts QEMU on a thread that lives as long: the death signal comes when the creating thread ends.
func (m *machine) start() error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := m.qemu.Start()
		started <- err
		if err == nil {
			_ = m.qemu.Wait()
		}
		close(m.ended)
	}()
	return <-started
}

// end takes the host away and removes what it left.
func (m *machine) end() {
	if m.qemu != nil && m.qemu.Process != nil {
		_ = m.qemu.Process.Kill()
		<-m.ended
	}
	for _, f := range append([]*os.File{m.control}, m.streams[:]...) {
		if f != nil {
			f.Close()
		}
	}
	_ = os.RemoveAll(m.scratch)
}

// oops begins what a kernel prints of its own crash.
var oops = regexp.MustCompile(`BUG: (TASK|unable|kernel)|Oops|stack guard|double fault|general protection|Kernel panic`)

// words are the last that console and QEMU said, and where the kernel crashed, what it said first. A trace of faults in faults
// may be a thousand lines.
func (m *machine) words() string {
	var all string
	for _, name := range []string{"console", "qemu"} {
		text, _ := os.ReadFile(filepath.Join(m.scratch, name))
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		from := max(0, len(lines)-40)
		if crash := slices.IndexFunc(lines, oops.MatchString); crash >= 0 {
			from = min(from, crash)
			if len(lines)-crash > 150 {
				lines = slices.Delete(lines, crash+30, len(lines)-120)
			}
		}
		all += "\n" + strings.Join(lines[from:], "\n")
	}
	return strings.TrimSpace(all)
}

// monitor has QEMU run a command, and gives what it says.
func (m *machine) monitor(command string) (string, error) {
	conn, err := net.DialTimeout("unix", filepath.Join(m.scratch, "monitor"), time.Minute)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(conn, command+"\n"); err != nil {
		return "", err
	}
	var text []byte
	for bytes.Count(text, []byte("(qemu) ")) < 2 { // it asks for the next command
		some := make([]byte, 4096)
		n, err := conn.Read(some)
		text = append(text, some[:n]...)
		if err != nil {
			return string(text), err
		}
	}
	return string(text), nil
}

// processors says, by QEMU's monitor, where the host's processors are, twice, some time apart, and what top(1) says of their threads.
func (m *machine) processors() string {
	var all []string
	for range 2 {
		text, err := m.monitor("info registers -a")
		if err != nil {
			return err.Error()
		}
		all = append(all, regexp.MustCompile(`[RE]IP=.*|CPU#\d+`).FindAllString(text, -1)...)
		time.Sleep(5 * time.Second)
	}
	// Its first round is of the time since they began.
	text, _ := exec.Command("top", "-H", "-b", "-n", "2", "-d", "2", "-p", strconv.Itoa(m.qemu.Process.Pid)).Output()
	all = append(all, regexp.MustCompile(`(?m)^.* CPU \d+/.*$`).FindAllString(string(text), -1)...)
	return strings.Join(all, "; ")
}

// hear gives what the host says, and is closed at its end.
func (m *machine) hear() <-chan protocol.Progress {
	heard := make(chan protocol.Progress)
	go func() {
		defer close(heard)
		from := json.NewDecoder(m.control)
		for {
			var p protocol.Progress
			if from.Decode(&p) != nil {
				return
			}
			heard <- p
		}
	}()
	return heard
}

// serve hands the command over and passes everything on until it has ended.
func (m *machine) serve(job *protocol.Job, timeout time.Duration) (int, error) {
	to := json.NewEncoder(m.control)
	if err := to.Encode(job); err != nil {
		return 0, fmt.Errorf("handing the command to the emulated host: %w", err)
	}
	var copied sync.WaitGroup
	if job.Terminal {
		if state, err := term.MakeRaw(int(os.Stdin.Fd())); err == nil {
			defer func() { _ = term.Restore(int(os.Stdin.Fd()), state) }()
		}
	} else {
		go func() {
			_, _ = io.Copy(m.streams[0], os.Stdin)
			_ = unix.Shutdown(int(m.streams[0].Fd()), unix.SHUT_WR)
		}()
		copied.Go(func() { _, _ = io.Copy(os.Stdout, m.streams[1]) })
		copied.Go(func() { _, _ = io.Copy(os.Stderr, m.streams[2]) })
	}
	heard := m.hear()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	defer signal.Stop(signals)
	var late <-chan time.Time
	if timeout > 0 {
		late = time.After(timeout)
	}
	boot := time.After(bootPatience)
	alive := time.NewTimer(hangs + bootPatience)
	var ask <-chan time.Time // from when it is up: a pile of what nobody reads would block
	interrupted := false
	for {
		select {
		case s := <-signals:
			if s == unix.SIGQUIT { // a Go program says what it is doing, and ends
				_ = to.Encode(protocol.Signal{Number: int(unix.SIGQUIT)})
				continue
			}
			if interrupted {
				return 0, errors.New("interrupted twice: the emulated host is taken away")
			}
			interrupted = true
			_ = to.Encode(protocol.Signal{Number: int(s.(syscall.Signal))})
		case <-boot:
			return 0, fmt.Errorf("the emulated host isn't up in %v; its last words: %s", bootPatience, m.words())
		case <-ask:
			_ = to.Encode(protocol.Signal{})
		case <-alive.C:
			return 0, fmt.Errorf("%w: nothing heard of it for %v; its processors: %s; its last words: %s", ErrHost, hangs, m.processors(), m.words())
		case <-late:
			return 0, fmt.Errorf("the command didn't end within %v: the emulated host is taken away", timeout)
		case p, ok := <-heard:
			switch {
			case !ok:
				<-m.ended
				return 0, fmt.Errorf("%w: it ended by itself; its last words: %s", ErrHost, m.words())
			case p.Beat:
				alive.Reset(hangs)
			case p.Error != "":
				return 0, fmt.Errorf("in the emulated host: %s", p.Error)
			case p.Up != nil:
				boot, ask = nil, time.Tick(protocol.BeatSeconds*time.Second)
				alive.Reset(hangs)
				say("Linux %s with a real kvm_amd, EMULATED, up in %.0f s; clocksource %s; no figure of time means anything in it",
					p.Up.Kernel, p.Up.Seconds, p.Up.ClockSource)
			case p.Exit != nil:
				select {
				case <-m.ended: // it switches itself off
				case <-time.After(time.Minute):
					_ = m.qemu.Process.Kill()
					<-m.ended
				}
				copied.Wait()
				return *p.Exit, nil
			}
		}
	}
}

// Stretched is how much a clock may be off, in ns, after it was written, where it may be off by that much natively: by as long
// as the kernel and the module take for it, which is ten to thirty times as long in an emulated host. A clock that was left
// alone is right in either.
func Stretched(native int64) int64 {
	if Emulated() {
		return 10 * native
	}
	return native
}
