package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"
	"ftclock/test/qmp"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// Ports of the devices that the guest is made to use (hw/ide, hw/watchdog/wdt_ib700.c, hw/misc/pvpanic-isa.c of QEMU).
const (
	portIDEData    = 0x1f0
	portIDECount   = 0x1f2
	portIDESector  = 0x1f3
	portIDEDevice  = 0x1f6
	portIDECommand = 0x1f7
	portWatchdog   = 0x443
	portPanic      = 0x505
)

// QEMU pauses its guest for reasons of its own. Whoever lets it go on, the policy says what becomes of its clock.
func TestKVMPausesInsideQEMU(t *testing.T) {
	dir := check.Value(privatelibvirt.QEMUDir("inside"))(t)
	full := fullDisk(t)
	x := managed("inside", clockElement)
	check.Value(privatelibvirt.AddMonitor(x))(t)
	x.OnCrash = "preserve"
	x.Devices.Watchdogs = []libvirtxml.DomainWatchdog{{Model: "ib700", Action: "pause"}}
	x.Devices.Panics = []libvirtxml.DomainPanic{{Model: "isa"}}
	x.Devices.Disks = []libvirtxml.DomainDisk{{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw", ErrorPolicy: "stop"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: full.disk}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "hda", Bus: "ide"},
	}}
	d, clock := start(t, x)
	hands := handsOf(t, d)
	monitor := monitorOf(t, d)
	pause(t, d, 5*time.Millisecond) // takes the anchor

	// Every rule with one pause of either kind, those whose end the shim sees and those that it doesn't; FTCLOCK_LONG=1 has all
	// of them with all.
	some := rules[:2]
	if os.Getenv("FTCLOCK_LONG") == "1" {
		some = rules
	}

	// resumed ends a pause that has begun as a person does, who sees that the guest is in that state.
	resumed := func(t *testing.T, state libvirt.DomainState) {
		t.Helper()
		awaitState(t, d, state)
		awaitStop(t, monitor)
		time.Sleep(rulePause)
		check.NoError(t, d.Resume())
	}
	t.Run("I/O error", func(t *testing.T) {
		underRules(t, rules, d, clock, true, func(t *testing.T) {
			full.fill(t)
			writeSector(t, hands, full.nextSector())
			awaitState(t, d, libvirt.DOMAIN_PAUSED)
			full.makeRoom(t) // QEMU makes the write again
			resumed(t, libvirt.DOMAIN_PAUSED)
		})
	})
	t.Run("watchdog", func(t *testing.T) {
		underRules(t, some, d, clock, true, func(t *testing.T) {
			hands.LastOut8(portWatchdog, 0xf) // at once
			resumed(t, libvirt.DOMAIN_PAUSED)
		})
	})
	t.Run("panic", func(t *testing.T) {
		underRules(t, some, d, clock, true, func(t *testing.T) {
			hands.LastOut8(portPanic, 1)
			resumed(t, libvirt.DOMAIN_CRASHED)
		})
	})
	t.Run("human monitor", func(t *testing.T) {
		underRules(t, some, d, clock, false, func(t *testing.T) {
			human(t, d, "stop")
			awaitState(t, d, libvirt.DOMAIN_PAUSED)
			time.Sleep(rulePause)
			human(t, d, "cont")
			awaitState(t, d, libvirt.DOMAIN_RUNNING)
		})
	})
	t.Run("second monitor", func(t *testing.T) {
		underRules(t, some, d, clock, false, func(t *testing.T) {
			execute(t, monitor, "stop", nil)
			awaitState(t, d, libvirt.DOMAIN_PAUSED)
			time.Sleep(rulePause)
			execute(t, monitor, "cont", nil)
			awaitState(t, d, libvirt.DOMAIN_RUNNING) // libvirt hears of it later than we do, and pauses no guest that it takes for paused
		})
	})
	t.Run("stopped by a second monitor, resumed by libvirt", func(t *testing.T) {
		underRules(t, some, d, clock, true, func(t *testing.T) {
			execute(t, monitor, "stop", nil)
			resumed(t, libvirt.DOMAIN_PAUSED)
		})
	})
	t.Run("gdb", func(t *testing.T) {
		socket := filepath.Join(dir, "gdb.sock")
		human(t, d, "gdbserver unix:"+socket+",server=on,wait=off")
		gdb := check.Value(net.Dial("unix", socket))(t)
		defer gdb.Close()
		send := func(t *testing.T, text string) {
			t.Helper()
			check.Value(gdb.Write([]byte(text)))(t)
		}
		go func() { _, _ = io.Copy(io.Discard, gdb) }()
		awaitState(t, d, libvirt.DOMAIN_PAUSED) // who connects stops the guest
		send(t, "$c#63")
		awaitState(t, d, libvirt.DOMAIN_RUNNING)
		underRules(t, some, d, clock, false, func(t *testing.T) {
			send(t, "+\x03") // the stub may wait for a + since the pause before
			awaitState(t, d, libvirt.DOMAIN_PAUSED)
			time.Sleep(rulePause)
			send(t, "+$c#63")
			awaitState(t, d, libvirt.DOMAIN_RUNNING)
		})
		gdb.Close()
		human(t, d, "gdbserver none")
		awaitState(t, d, libvirt.DOMAIN_RUNNING)
	})
	t.Run("migration cancelled at its switch-over", func(t *testing.T) {
		sink := discard(t, dir)
		execute(t, monitor, "migrate-set-capabilities", capability("pause-before-switchover", true))
		underRules(t, rules, d, clock, false, func(t *testing.T) {
			execute(t, monitor, "migrate", map[string]any{"uri": "unix:" + sink})
			awaitMigration(t, monitor, "pre-switchover")
			time.Sleep(rulePause)
			execute(t, monitor, "migrate_cancel", nil)
			awaitMigration(t, monitor, "cancelled")
			awaitState(t, d, libvirt.DOMAIN_RUNNING)
		})
		execute(t, monitor, "migrate-set-capabilities", capability("pause-before-switchover", false))
	})
	t.Run("migrated, and continued here", func(t *testing.T) {
		sink := discard(t, dir)
		underRules(t, some, d, clock, true, func(t *testing.T) {
			execute(t, monitor, "migrate", map[string]any{"uri": "unix:" + sink})
			awaitMigration(t, monitor, "completed")
			resumed(t, libvirt.DOMAIN_PAUSED)
		})
	})
}

// A full disk is a file system of a few pages that has no room left.
type fullFS struct {
	dir, disk string
	sector    uint32
}

func fullDisk(t *testing.T) *fullFS {
	t.Helper()
	dir := check.Value(privatelibvirt.QEMUDir("full"))(t)
	if err := unix.Mount("ftclock-test", dir, "tmpfs", 0, "mode=0755,size=64k"); err != nil {
		t.Fatal("mounting a small tmpfs: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	f := &fullFS{dir: dir, disk: filepath.Join(dir, "disk")}
	check.NoError(t, errors.Join(os.WriteFile(f.disk, nil, 0o644), os.Truncate(f.disk, 1<<20)))
	return f
}

func (f *fullFS) fill(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, "filler"), make([]byte, 1<<20), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a file system of 64 KiB takes more than that: %v", err)
	}
}

func (f *fullFS) makeRoom(t *testing.T) {
	t.Helper()
	check.NoError(t, os.Remove(filepath.Join(f.dir, "filler")))
}

// nextSector is a sector on a page of the file that doesn't exist yet.
func (f *fullFS) nextSector() uint32 {
	f.sector += 8
	return f.sector
}

// writeSector has the guest write a sector of its first IDE disk, without waiting for the end of it.
func writeSector(t *testing.T, hands *guest.Hands, sector uint32) {
	t.Helper()
	for i, value := range []byte{1, byte(sector), byte(sector >> 8), byte(sector >> 16), 0xe0, 0x30} { // WRITE SECTORS
		check.NoError(t, hands.Out8(portIDECount+uint16(i), value))
	}
	check.Await(t, 3*time.Minute, 0, func() bool {
		return check.Value(hands.In8(portIDECommand))(t)&0x88 == 0x08 // DRQ, and not BSY
	}, "the disk being ready")
	hands.LastOut16(portIDEData, 0x5a5a, 256)
}

// discard listens on a socket in dir for QEMU, and throws away what comes.
func discard(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "sink.sock")
	l := check.Value(net.Listen("unix", path))(t)
	t.Cleanup(func() { _ = l.Close() })
	check.NoError(t, os.Chmod(path, 0o777))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	return path
}

// awaitStop waits until QEMU has paused its guest: libvirt may know the reason before that.
func awaitStop(t *testing.T, monitor *qmp.Conn) {
	t.Helper()
	check.Await(t, 3*time.Minute, time.Millisecond, func() bool {
		var status struct {
			Running bool `json:"running"`
		}
		check.NoError(t, json.Unmarshal(check.Value(monitor.Execute("query-status", nil))(t), &status))
		return !status.Running
	}, "QEMU's pause")
}

// awaitMigration waits until QEMU's migration is in that state.
func awaitMigration(t *testing.T, monitor *qmp.Conn, want string) {
	t.Helper()
	var last struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		ask := func(command string, to any) {
			check.NoError(t, json.Unmarshal(check.Value(monitor.Execute(command, nil))(t), to))
		}
		ask("query-migrate", &last)
		// QEMU says "completed" before it has finalized it, and refuses a cont until then.
		var run struct {
			Status string `json:"status"`
		}
		if ask("query-status", &run); last.Status == want && (want != "completed" || run.Status != "finish-migrate") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the migration is %s (%s), want %s", last.Status, last.Error, want)
		}
	}
}

func capability(name string, on bool) map[string]any {
	return map[string]any{"capabilities": []map[string]any{{"capability": name, "state": on}}}
}

// execute runs a command on a monitor; it must succeed.
func execute(t *testing.T, monitor *qmp.Conn, command string, arguments any) {
	t.Helper()
	check.Value(monitor.Execute(command, arguments))(t)
}

// human runs a command of QEMU's human monitor through libvirt; it must say nothing.
func human(t *testing.T, d *privatelibvirt.Domain, command string) {
	t.Helper()
	answer := check.Value(d.QemuMonitorCommand(command, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_HMP))(t)
	if answer != "" {
		t.Logf("%s: %s", command, answer)
	}
}
