package kvmhost

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"ftclock/test/built"
	"ftclock/test/kvmhost/protocol"
)

// HostOptions are what whole hosts can differ in.
type HostOptions struct {
	// Image is the directory of a whole Debian, which the host can't change: see package container.
	Image string
	// Disk is a file that keeps what the host writes; it is made where it isn't there. "" has it go with the host.
	Disk string
	// OnDisk has the Disk be a copy of the image, and the host see nothing of this machine: one that sleeps loses what it sees.
	OnDisk bool
	// Read are directories of this machine that the host sees, by their places in it. The places are made in its file system.
	Read map[string]string
	// Suite and Append are Options'.
	Suite, Append string
	// Memory is in MiB; 0 is 3072.
	Memory int
	// Cable joins two hosts by a network that has no one else: a directory for it, which both name, and which End, 0 or 1, this
	// one has. "" is none.
	Cable string
	End   int
}

// cable is what QEMU is told of an end. It carries whole packets, so that either host can be away for a while.
func (o HostOptions) cable() []string {
	if o.Cable == "" {
		return nil
	}
	end := func(n int) string { return filepath.Join(o.Cable, strconv.Itoa(n)) }
	return []string{
		"-netdev", "dgram,id=cable,local.type=unix,local.path=" + end(o.End) + ",remote.type=unix,remote.path=" + end(1-o.End),
		"-device", fmt.Sprintf("virtio-net-pci,netdev=cable,mac=52:54:00:00:02:%02x", 1+o.End),
	}
}

// Address is that of the host's end of the cable; "" where there is none.
func (o HostOptions) Address() string {
	if o.Cable == "" {
		return ""
	}
	return fmt.Sprintf("192.0.2.%d", 1+o.End)
}

// Host is a whole host that runs: a Debian with its own process 1, on a virtual machine whose plug can be pulled. The machine is
// emulated, unless this one has a KVM that nests.
type Host struct {
	*machine

	say      sync.Mutex
	mu       sync.Mutex
	last     int
	waiting  map[int]chan protocol.Result
	gone     chan struct{} // closed when nothing is heard of it any more
	why      error         // why, once gone is closed
	released sync.Once
}

// quiet has systemd not wait for a login on the console, whose device nobody tells it of.
const quiet = "systemd.mask=serial-getty@ttyS0.service "

// Boot boots a whole host and waits until its system manager has started everything. It wants root, to read all of the image.
func Boot(o HostOptions) (*Host, error) {
	root, err := built.Root()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(root, "build/host")
	memory, err := lacks(dir)
	if err != nil {
		return nil, err
	}
	if o.Memory == 0 {
		o.Memory = leastMemory
	}
	f, err := prepare(dir, o.Suite)
	if err != nil {
		return nil, err
	}
	if err := o.format(); err != nil {
		return nil, err
	}
	job := protocol.Job{Init: "/sbin/init", Address: o.Address(), Disk: o.Disk != "", OnDisk: o.OnDisk, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LC_ALL=C.UTF-8", "HOME=/root", "TERM=dumb", "DEBIAN_FRONTEND=noninteractive"}}
	m := machineOptions{kernel: f, memory: min(memory, o.Memory), append: quiet + o.Append, disk: o.Disk, more: o.cable()}
	if !o.OnDisk {
		m.root = o.Image
	}
	if m.nested, err = nests(); err != nil {
		return nil, err
	}
	for outside, inside := range o.Read {
		m.read, job.Read = append(m.read, outside), append(job.Read, inside)
	}
	h := &Host{waiting: map[int]chan protocol.Result{}, gone: make(chan struct{})}
	if h.machine, err = boot(m); err != nil {
		return nil, err
	}
	if err := h.begin(job); err != nil {
		h.Cut()
		return nil, fmt.Errorf("booting a host of %s: %w", o.Image, err)
	}
	return h, nil
}

// nests says whether this machine's KVM runs hosts that have a KVM of their own.
func nests() (bool, error) {
	native, err := Native()
	if err != nil || !native {
		return false, err
	}
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		if text, err := os.ReadFile("/sys/module/" + module + "/parameters/nested"); err == nil && strings.ContainsAny(string(text), "Y1") {
			return true, nil
		}
	}
	return false, nil
}

// format makes a file system for what a host writes, unless it is there.
func (o HostOptions) format() error {
	if o.Disk == "" {
		return nil
	}
	f, err := os.OpenFile(o.Disk, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(4 << 30); err != nil {
		return err
	}
	args := []string{"-q", "-F", o.Disk}
	if o.OnDisk {
		args = append(args, "-d", o.Image)
	}
	mkfs := exec.Command("mkfs.ext4", args...)
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		return errors.Join(fmt.Errorf("making the host's disk: mkfs.ext4: %w: %s", err, bytes.TrimSpace(out)), os.Remove(o.Disk))
	}
	return nil
}

func (h *Host) begin(job protocol.Job) error {
	if err := json.NewEncoder(h.control).Encode(job); err != nil {
		return err
	}
	up := make(chan error, 1)
	go h.follow(up)
	select {
	case err := <-up:
		if err != nil {
			return err
		}
	case <-h.gone:
		return h.why
	}
	for end := time.Now().Add(bootPatience); ; time.Sleep(200 * time.Millisecond) {
		out, err := h.Run("systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state == "running" || state == "degraded" {
			return nil
		}
		select {
		case <-h.gone:
			return h.why
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("it isn't up in %v: %w: %s; its last words: %s", bootPatience, err, out, h.words())
		}
	}
}

// follow takes what the host says until its end.
func (h *Host) follow(up chan<- error) {
	heard := h.hear()
	alive := time.NewTimer(bootPatience)
	// From when it is up: what comes together with the job is lost with the process that reads that.
	var ask <-chan time.Time
	end := func(why error) {
		h.why = why
		close(h.gone)
		for range heard {
		}
	}
	for {
		select {
		case <-ask:
			h.ask()
		case <-alive.C:
			why := fmt.Errorf("%w: nothing heard of it; its processors: %s; its last words: %s", ErrHost, h.processors(), h.words())
			_ = h.qemu.Process.Kill()
			end(why)
			return
		case p, ok := <-heard:
			switch {
			case !ok:
				end(fmt.Errorf("the host has ended; its last words: %s", h.words()))
				return
			case p.Error != "":
				up <- errors.New(p.Error)
			case p.Up != nil:
				ask = time.Tick(protocol.BeatSeconds * time.Second)
				alive.Reset(hangs)
				up <- nil
			case p.Beat:
				alive.Reset(hangs)
			case p.Result != nil:
				h.mu.Lock()
				to := h.waiting[p.Result.ID]
				delete(h.waiting, p.Result.ID)
				h.mu.Unlock()
				if to != nil {
					to <- *p.Result
				}
			}
		}
	}
}

// Run runs a command on the host, as root, outside of any unit, and gives what it prints, both streams, with the error where it
// fails or the host ends.
func (h *Host) Run(args ...string) (string, error) { return h.Feed(nil, args...) }

// Feed is Run with something on the command's standard input.
func (h *Host) Feed(input []byte, args ...string) (string, error) {
	to := make(chan protocol.Result, 1)
	h.mu.Lock()
	h.last++
	c := protocol.Call{ID: h.last, Args: slices.Clone(args), Input: input}
	h.waiting[c.ID] = to
	h.mu.Unlock()
	if err := h.tell(c); err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	select {
	case r := <-to:
		var err error
		switch {
		case r.Error != "":
			err = fmt.Errorf("%s: %s", strings.Join(args, " "), r.Error)
		case r.Code != 0:
			err = fmt.Errorf("%s: exit code %d: %s", strings.Join(args, " "), r.Code, bytes.TrimSpace(r.Output))
		}
		return string(r.Output), err
	case <-h.gone:
		return "", fmt.Errorf("%s: %w", strings.Join(args, " "), h.why)
	}
}

func (h *Host) tell(c protocol.Call) error {
	h.say.Lock()
	defer h.say.Unlock()
	return json.NewEncoder(h.control).Encode(c)
}

// Sleep has the host suspend itself to memory, and wakes it up so long after it did. One that slept since it booted is woken up at
// once by the emulator.
func (h *Host) Sleep(d time.Duration) error {
	woken := make(chan error, 1)
	go func() {
		_, err := h.Run("sh", "-c", "echo mem >/sys/power/state")
		woken <- err
	}()
	for end := time.Now().Add(bootPatience); ; time.Sleep(50 * time.Millisecond) {
		state, err := h.monitor("info status")
		if err != nil {
			return err
		}
		if strings.Contains(state, "suspended") {
			break
		}
		select {
		case err := <-woken:
			return err
		default:
		}
		if time.Now().After(end) {
			return errors.New("the host doesn't go to sleep; its last words: " + h.words())
		}
	}
	time.Sleep(d)
	if _, err := h.monitor("system_wakeup"); err != nil {
		return err
	}
	return <-woken
}

// ask asks for a beat, unless a call is being handed over: to a host that hangs that may take for ever.
func (h *Host) ask() {
	if h.say.TryLock() {
		defer h.say.Unlock()
		_ = json.NewEncoder(h.control).Encode(protocol.Call{})
	}
}

// Cut pulls the host's plug. What it hadn't written to its disk is lost.
func (h *Host) Cut() { h.released.Do(h.end) }
