package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ftclock/test/built"
	"ftclock/test/guest"
	"ftclock/test/linuxguest"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"
)

// agentGuest is a Linux that fetch.sh made, Debian's stock kernel, emulated by QEMU.
type agentGuest struct {
	*subject
	clocks *linuxguest.Clocks
}

// agent has a guest's own programs make pauses good: qemu-guest-agent at virsh's word, and chrony.
func (b *bench) agent() (string, error) {
	if b.quick {
		return "", unavailable("the quick form leaves it out")
	}
	if _, err := os.Stat(filepath.Join(b.guest, "done")); err != nil {
		return "", unavailable("no guest was fetched (test/bench/fetch.sh)")
	}
	initrd, err := b.agentInitrd()
	if err != nil {
		return "", err
	}
	t := measure.NewTable("CLOCK_REALTIME of the guest, behind the host's", "before", "after 10 pauses", "100", "1,000")

	withAgent, err := b.startAgentGuest("agent", initrd, "")
	if err != nil {
		return "", err
	}
	defer withAgent.end()
	virsh := func(option string) func() error {
		return func() error {
			_, err := privatelibvirt.Virsh("domtime", withAgent.Name, option)
			return err
		}
	}
	now := virsh("--now")
	for end := time.Now().Add(2 * time.Minute); now() != nil; time.Sleep(time.Second) {
		if time.Now().After(end) {
			return "", fmt.Errorf("the guest's agent doesn't answer: %w", now())
		}
	}
	const length, corrected = 20 * time.Millisecond, 100
	var lost []int64
	for _, c := range []struct {
		name   string
		after  func() error // each pause
		counts []int
	}{
		{"stock QEMU", nil, []int{10, 100, 1000}},
		{"`virsh domtime --sync` after each pause", virsh("--sync"), []int{10, corrected}},
		{"`virsh domtime --now` after each pause", now, []int{10, corrected}},
	} {
		if err := now(); err != nil {
			return "", err
		}
		cells := []string{c.name}
		before, err := withAgent.behind()
		if err != nil {
			return "", err
		}
		cells = append(cells, measure.Drift(before))
		done := 0
		var took []float64
		var left int64
		for _, count := range c.counts {
			for ; done < count; done++ {
				if err := withAgent.Pause(length); err != nil {
					return "", err
				}
				if c.after == nil {
					continue
				}
				began := time.Now()
				if err := c.after(); err != nil {
					return "", err
				}
				took = append(took, time.Since(began).Seconds())
			}
			if left, err = withAgent.behind(); err != nil {
				return "", err
			}
			cells = append(cells, measure.Drift(left))
		}
		lost = append(lost, left-before)
		if c.after != nil {
			cells[0] += fmt.Sprintf(" (%.2f s each)", measure.Median(took))
			cells = append(cells, fmt.Sprintf("would take %.0f minutes", measure.Median(took)*1000/60))
		}
		t.Row(cells...)
		fmt.Fprintf(b.progress, "bench:   %v\n", cells)
	}
	b.check(lost[0] >= 1000*int64(length), "the emulated guest lost only %s of 1,000 pauses of %v", measure.Drift(lost[0]), length)
	for i, name := range []string{"--sync", "--now"} {
		// It knows whole seconds only: that much ahead isn't wrong, and behind by all of the pauses is nothing done.
		b.check(lost[i+1] < corrected*int64(length) && lost[i+1] > -2*int64(time.Second), "virsh domtime %s left %s of %d pauses: it didn't do its work", name, measure.Drift(lost[i+1]), corrected)
	}
	withAgent.end()

	// What the agent left is worth having even so.
	var missing []string
	for _, c := range []struct {
		steps, name string
		counts      []int
	}{
		{"3", "chrony in the guest, polling each second, 10 pauses a second", []int{10, 100, 1000}},
		{"-1", "the same with `makestep 0.001 -1`: it steps the clock whenever it is off", []int{10, 100, 1000}},
	} {
		if err := b.chrony(t, initrd, c.steps, c.name, length, c.counts); err != nil {
			missing = append(missing, fmt.Sprintf("\nNot measured in this run, %s: %v.\n", c.name, err))
		}
	}
	t.WriteString(strings.Join(missing, ""))
	t.WriteString("\nDebian's stock kernel, qemu-guest-agent and chrony in a guest that QEMU emulates (TCG): no such kernel boots on this machine's KVM, and TCG has no kvmclock, but its " +
		"other clocks stand in a pause the same way. Pauses are 20 ms. 10,000 of them at ten a second would take 17 minutes a row. Of a clock that it steps, chronyd takes " +
		"what pauses lose for a slow oscillator, and has it run faster: it may be ahead afterwards. domtime --sync has the agent run hwclock, --now gives it the host's time. " +
		"ftclock needs no agent and does nothing in such a guest; its figures are those above.\n")
	return t.String(), nil
}

// chrony has chronyd in the guest follow one on the host while there are ten pauses a second; steps is for makestep.
func (b *bench) chrony(t *measure.Table, initrd, steps, name string, length time.Duration, counts []int) error {
	conf := filepath.Join(privatelibvirt.Dir, "chrony.conf")
	if err := os.WriteFile(conf, []byte("local stratum 3\nallow\nbindaddress 127.0.0.1\ncmdport 0\npidfile /run/chronyd-bench.pid\n"), 0o644); err != nil {
		return err
	}
	// -x: it leaves this machine's clock alone.
	server := exec.Command(filepath.Join(b.guest, "root/usr/sbin/chronyd"), "-d", "-x", "-u", "root", "-f", conf)
	log, err := os.Create(filepath.Join(privatelibvirt.Dir, "chronyd"+steps+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		return fmt.Errorf("starting chronyd: %w", err)
	}
	defer func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	}()
	g, err := b.startAgentGuest("chrony", initrd, "chrony-steps="+steps)
	if err != nil {
		return err
	}
	defer g.end()
	before := int64(0)
	for end := time.Now().Add(90 * time.Second); ; time.Sleep(time.Second) {
		if before, err = g.behind(); err != nil {
			return err
		}
		if before < int64(5*time.Millisecond) && before > -int64(5*time.Millisecond) {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("chrony leaves the guest %s behind in 90 s without pauses", measure.Drift(before))
		}
	}
	cells := []string{name, measure.Drift(before)}
	done := 0
	var left int64
	for _, count := range counts {
		for ; done < count; done++ {
			if err := g.Pause(length); err != nil {
				return err
			}
			time.Sleep(80 * time.Millisecond)
		}
		if left, err = g.behind(); err != nil {
			return err
		}
		cells = append(cells, measure.Drift(left))
	}
	time.Sleep(30 * time.Second)
	rest, err := g.behind()
	if err != nil {
		return err
	}
	cells[len(cells)-1] += fmt.Sprintf(" (%d), %s half a minute later", done, measure.Drift(rest))
	t.Row(cells...)
	fmt.Fprintf(b.progress, "bench:   %v\n", cells)
	// It slews by a twelfth at most: of half a minute these are two seconds and a half.
	b.check(rest < int64(10*time.Millisecond) || left-rest > int64(time.Second), "chrony left %s of %d pauses, and %s half a minute later: it didn't do its work",
		measure.Drift(left), done, measure.Drift(rest))
	return nil
}

// agentInitrd adds the program that publishes the guest's clocks, and packs.
func (b *bench) agentInitrd() (string, error) {
	root := filepath.Join(privatelibvirt.Dir, "agent-root")
	initrd := filepath.Join(privatelibvirt.Dir, "agent-initrd")
	init, err := built.Path(built.LinuxInit)
	if err != nil {
		return "", err
	}
	clock, err := os.ReadFile(init)
	if err != nil {
		return "", err
	}
	if out, err := exec.Command("cp", "-a", filepath.Join(b.guest, "root"), root).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copying the guest's tree: %w: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(root, "clock"), clock, 0o755); err != nil {
		return "", err
	}
	pack := exec.Command("sh", "-c", "find . | bin/busybox cpio -o -H newc >"+initrd)
	pack.Dir = root
	if out, err := pack.CombinedOutput(); err != nil {
		return "", fmt.Errorf("packing the guest's tree: %w: %s", err, out)
	}
	return initrd, os.RemoveAll(root)
}

func (b *bench) startAgentGuest(name, initrd, words string) (*agentGuest, error) {
	kernel := filepath.Join(privatelibvirt.Dir, "agent-kernel")
	if out, err := exec.Command("install", "-m", "644", filepath.Join(b.guest, "vmlinuz"), kernel).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copying the guest's kernel: %w: %s", err, out)
	}
	x := privatelibvirt.GuestXML(name, kernel)
	x.Type, x.Memory.Value = "qemu", 256
	x.OS.Initrd, x.OS.Cmdline = initrd, "console=ttyS0 quiet "+words
	// With the timers that such a machine has.
	privatelibvirt.ACPI(x)
	x.Clock = &libvirtxml.DomainClock{Offset: "utc"}
	x.Devices.Channels = []libvirtxml.DomainChannel{{
		Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind"}},
		Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}},
	}}
	x.Devices.Interfaces = []libvirtxml.DomainInterface{{
		Source: &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}},
		Model:  &libvirtxml.DomainInterfaceModel{Type: "virtio"},
	}}
	port := uint(0)
	x.Devices.Serials = []libvirtxml.DomainSerial{{
		Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: linuxguest.Console(name)}},
		Target: &libvirtxml.DomainSerialTarget{Port: &port},
	}}
	d, err := privatelibvirt.Define(b.conn, x)
	if err != nil {
		return nil, err
	}
	g := &agentGuest{subject: &subject{name: name, Domain: d}}
	if err := d.Create(); err != nil {
		return nil, errors.Join(err, d.Remove())
	}
	pid, err := d.PID()
	if err == nil {
		g.clocks, err = linuxguest.Open(pid, 3*time.Minute)
	}
	if err != nil {
		console, _ := os.ReadFile(linuxguest.Console(name))
		return nil, errors.Join(fmt.Errorf("%w; its console says: %s", err, console), d.Remove())
	}
	return g, nil
}

func (g *agentGuest) end() {
	if g.clocks == nil {
		return
	}
	_ = g.clocks.Close()
	g.clocks = nil
	g.subject.end()
}

// behind is how much the guest's CLOCK_REALTIME is behind the host's, ns. What TCG and a busy machine make of a reading is in it: some microseconds.
func (g *agentGuest) behind() (int64, error) {
	var c *guest.Clock = g.clocks.Realtime
	offset, _, err := c.Offset(300 * time.Millisecond)
	if err != nil {
		return 0, err
	}
	var real unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &real); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return offset + real.Nano() - guest.Raw(), nil
}
