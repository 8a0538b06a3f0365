package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"ftclock/control"
	"ftclock/test/check"
	"ftclock/test/domaintest"
)

// sweepFiles are what the steps read from $DIR.
var sweepFiles = map[string]string{
	"cd.iso": "no file system at all, and none is needed\n",
	"usb.xml": `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='$DIR/usb'/>
		<target dev='sda' bus='usb'/></disk>`,
	"rng.xml":    `<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>`,
	"tablet.xml": `<input type='tablet' bus='usb'><alias name='ua-tablet'/></input>`,
	"nic.xml": `<interface type='ethernet'><mac address='52:54:00:00:01:00'/><model type='e1000'/><link state='down'/>
		<rom enabled='no'/></interface>`,
	"usbnic.xml": `<interface type='ethernet'><mac address='52:54:00:00:01:01'/><model type='usb-net'/></interface>`,
	"push.xml": `<domainbackup mode='push'><disks><disk name='vda' type='file'><target file='$DIR/pushed'/>
		<driver type='qcow2'/></disk></disks></domainbackup>`,
	"pull.xml": `<domainbackup mode='pull'><server transport='unix' socket='$DIR/nbd.sock'/><disks><disk name='vda' type='file'>
		<scratch file='$DIR/scratch'/></disk></disks></domainbackup>`,
}

var (
	cpuTime  = regexp.MustCompile(`(?m)^(CPU time:|Id:) .*$`)
	progress = regexp.MustCompile(`(\r?[A-Z][a-z]+: \[ *\d+(\.\d+)? %\])+`)
	timings  = regexp.MustCompile(`(time|second)=\d+`)
	fdNumber = regexp.MustCompile(`"fd":\d+`)
	// measured is what libvirt says of a job that is done: it leaves out what is 0.
	measured = regexp.MustCompile(`(?s)Time elapsed.*`)
	// registers leaves only the names of what "info registers" shows.
	registers = regexp.MustCompile(`=[^\n]*`)
)

// sweepSteps is the script. First come the ends of QEMU's life and their opposites; the last of its lives has
// everything else, and its clock is looked at in the end.
var sweepSteps = []step{
	// Beginnings and ends.
	{line: "start sweep --paused"},
	{line: "domstate sweep --reason"},
	{line: "resume sweep"},
	{line: "domstate sweep --reason"},
	{line: "resume sweep", mayFail: true},
	{line: "suspend sweep"},
	{line: "suspend sweep"},
	{line: "domstate sweep --reason"},
	{line: "resume sweep"},
	{line: "start sweep", mayFail: true},
	{line: "save sweep /no/such/directory/saved", mayFail: true},
	{line: "domstate sweep --reason"},
	{line: "save sweep $DIR/saved"},
	{line: "save-image-dumpxml $DIR/saved"},
	{line: "domstate sweep --reason"},
	{line: "restore $DIR/saved"},
	{line: "domstate sweep --reason"},
	{line: "save sweep $DIR/saved --paused --verbose", mask: progress},
	{line: "restore $DIR/saved"},
	{line: "domstate sweep --reason"},
	{line: "save sweep $DIR/saved"},
	{line: "restore $DIR/saved --running"},
	{line: "domstate sweep --reason"},
	{line: "managedsave sweep"},
	{line: "managedsave-dumpxml sweep"},
	{line: "start sweep"},
	{line: "domstate sweep --reason"},
	{line: "managedsave sweep --running"},
	{line: "start sweep --force-boot"},
	{line: "managedsave sweep --paused"},
	{line: "managedsave-remove sweep"},
	{line: "start sweep"},
	{line: "dump sweep $DIR/dump --memory-only"},
	{line: "dump sweep $DIR/dump --memory-only --live"},
	{line: "dump sweep $DIR/dump --memory-only --format kdump-zlib"},
	{line: "dump sweep $DIR/dump --live"},
	{line: "dump sweep $DIR/dump --reset"},
	{line: "dump sweep /no/such/directory/dump --memory-only", mayFail: true},
	{line: "domstate sweep --reason"},
	{line: "domjobinfo sweep --completed", mask: measured},
	{line: "dump sweep $DIR/dump --crash --memory-only"},
	{line: "domstate sweep --reason"},
	{line: "start sweep"},
	{line: "snapshot-create-as sweep internal"},
	{line: "snapshot-create-as sweep second"},
	{line: "snapshot-list sweep --tree"},
	{line: "snapshot-dumpxml sweep internal"},
	{line: "snapshot-revert sweep internal"},
	{line: "domstate sweep --reason"},
	{line: "snapshot-revert sweep second --paused"},
	{line: "domstate sweep --reason"},
	{line: "resume sweep"},
	{line: "snapshot-current sweep --name"},
	{line: "snapshot-delete sweep second"},
	{line: "snapshot-delete sweep internal"},
	{line: "snapshot-create-as sweep halted --halt"},
	{line: "domstate sweep --reason"},
	{line: "snapshot-revert sweep halted --running"},
	{line: "domstate sweep --reason"},
	{line: "snapshot-delete sweep halted"},
	{line: "destroy sweep --graceful"},
	{line: "start sweep --autodestroy; domstate sweep --reason"},
	{line: "domstate sweep --reason", until: "shut off"},
	{line: "undefine sweep"},
	{line: "create $DIR/sweep.xml --paused"},
	{line: "resume sweep"},
	{line: "define $DIR/sweep.xml"},
	{line: "destroy sweep"},
	{line: "create $DIR/sweep.xml --autodestroy; dominfo sweep", mask: cpuTime},
	{line: "domstate sweep --reason", until: "shut off"},
	{line: "domrename sweep sweep2"},
	{line: "domrename sweep2 sweep"},

	// The life whose clock is looked at in the end.
	{line: "start sweep"},
	{line: "qemu-monitor-event sweep --loop", do: monitorEvents},

	// What libvirt says of it.
	{line: "list --name"},
	{line: "dumpxml sweep"},
	{line: "dumpxml sweep --inactive"},
	{line: "dominfo sweep", mask: cpuTime},
	{line: "domstats sweep", mask: numbers},
	{line: "domstats sweep --vm --raw", mask: numbers},
	{line: "domstats sweep --block --backing", mask: numbers},
	{line: "dommemstat sweep", mask: numbers},
	{line: "domblklist sweep --details"},
	{line: "domblkinfo sweep vda", mask: numbers},
	{line: "domblkinfo sweep --all --human", mask: numbers},
	{line: "domblkstat sweep vda --human", mask: numbers},
	{line: "domblkerror sweep"},
	{line: "domblkthreshold sweep vda 1M"},
	{line: "domiflist sweep"},
	{line: "domifaddr sweep"},
	{line: "domcontrol sweep"},
	{line: "domjobinfo sweep"},
	{line: "domjobabort sweep", mayFail: true},
	{line: "vcpuinfo sweep", mask: numbers},
	{line: "vcpucount sweep"},
	{line: "vcpupin sweep"},
	{line: "vcpupin sweep 0 0"},
	{line: "emulatorpin sweep"},
	{line: "emulatorpin sweep 0-1"},
	{line: "schedinfo sweep", mayFail: true},
	{line: "memtune sweep", mayFail: true},
	{line: "blkiotune sweep", mayFail: true},
	{line: "numatune sweep"},
	{line: "cpu-stats sweep --total", mask: numbers, mayFail: true},
	{line: "perf sweep"},
	{line: "domdisplay sweep"},
	{line: "vncdisplay sweep", mayFail: true},
	{line: "ttyconsole sweep", mayFail: true},
	{line: "domhostname sweep", mayFail: true},
	{line: "domlaunchsecinfo sweep", mayFail: true},
	{line: "desc sweep --title the sweep --live"},
	{line: "set-lifecycle-action sweep reboot destroy --live"},
	{line: "set-lifecycle-action sweep reboot restart --live"},
	{line: "domdirtyrate-calc sweep --seconds 1"},
	{line: "domstats sweep --dirtyrate", until: "calc_status=2", mask: timings},

	// What a guest agent would have to answer.
	{line: "domtime sweep", mayFail: true},
	{line: "domtime sweep --now", mayFail: true},
	{line: "set-user-password sweep root secret", mayFail: true},
	{line: "domfsinfo sweep", mayFail: true},
	{line: "domfsfreeze sweep", mayFail: true},
	{line: "domfstrim sweep", mayFail: true},
	{line: "guestinfo sweep", mayFail: true},
	{line: "get-user-sshkeys sweep root", mayFail: true},
	{line: `qemu-agent-command sweep '{"execute":"guest-ping"}'`, mayFail: true},
	{line: "dompmsuspend sweep mem", mayFail: true},
	{line: "dompmwakeup sweep", mayFail: true},
	{line: "shutdown sweep --mode agent", mayFail: true},

	// The monitor itself.
	{line: `qemu-monitor-command sweep '{"execute":"query-status"}'`},
	{line: `qemu-monitor-command sweep '{"execute":"query-status","id":"mine"}'`, mayFail: true},
	{line: `qemu-monitor-command sweep query-status --pretty`, mayFail: true},
	{line: `qemu-monitor-command sweep '{"execute":"query-qmp-schema"}'`},
	{line: `qemu-monitor-command sweep --pretty '{"execute":"query-qmp-schema"}'`},
	{line: `qemu-monitor-command sweep '{"execute":"qom-list-types"}' --return-value`},
	{line: `qemu-monitor-command sweep '{"execute":"no-such-command"}'`},
	{line: `qemu-monitor-command sweep '{"execute":"query-status","arguments":{"no-such-argument":"ü\u0000\uD83D\uDE00"}}'`},
	{line: `qemu-monitor-command sweep '{"execute":"query-status"'`, mayFail: true},
	{line: `qemu-monitor-command sweep '[]'`, mayFail: true},
	{line: `qemu-monitor-command sweep '{"execute":"qmp_capabilities"}'`},
	{line: `qemu-monitor-command sweep '{"exec-oob":"query-status"}'`},
	{line: `qemu-monitor-command sweep --hmp info status`},
	{line: `qemu-monitor-command sweep --hmp info registers`, mask: registers},
	{line: `qemu-monitor-command sweep --hmp no such command`},
	{line: `qemu-monitor-command sweep --hmp help`},
	{line: `qemu-monitor-command sweep '{"execute":"stop"}'`},
	{line: "domstate sweep --reason"},
	{line: `qemu-monitor-command sweep '{"execute":"cont"}'`},
	{line: "domstate sweep --reason"},
	{line: "qemu-monitor-command sweep --hmp stop"},
	{line: "qemu-monitor-command sweep --hmp cont"},
	{line: "domstate sweep --reason"},
	{line: `qemu-monitor-command sweep --pass-fds 3 '{"execute":"getfd","arguments":{"fdname":"one"}}'`, fds: 1},
	{line: `qemu-monitor-command sweep '{"execute":"closefd","arguments":{"fdname":"one"}}'`},
	{line: `qemu-monitor-command sweep '{"execute":"closefd","arguments":{"fdname":"one"}}'`},
	{line: `qemu-monitor-command sweep '{"execute":"getfd","arguments":{"fdname":"none"}}'`},
	{line: `qemu-monitor-command sweep --pass-fds 3,4,5 '{"execute":"getfd","arguments":{"fdname":"three"}}'`, fds: 3, mayFail: true},
	{line: `qemu-monitor-command sweep --pass-fds 3 '{"execute":"query-status"}'`, fds: 1},
	{line: `qemu-monitor-command sweep --pass-fds 3 '{"execute":"add-fd","arguments":{"fdset-id":99,"opaque":"sweep"}}'`, fds: 1, mask: fdNumber},
	{line: `qemu-monitor-command sweep '{"execute":"query-fdsets"}'`, mask: fdNumber},
	{line: `qemu-monitor-command sweep '{"execute":"remove-fd","arguments":{"fdset-id":99}}'`},
	{line: `qemu-monitor-command sweep '{"execute":"query-fdsets"}'`, mask: fdNumber},

	// Disks.
	{line: "snapshot-create-as sweep overlay --disk-only --atomic --no-metadata --diskspec vda,file=$DIR/overlay"},
	{line: "domblklist sweep"},
	{line: "blockcommit sweep vda --active --wait --pivot"},
	{line: "domblklist sweep"},
	{line: "snapshot-create-as sweep overlay --disk-only --no-metadata --diskspec vda,file=$DIR/overlay2"},
	{line: "blockpull sweep vda --wait"},
	{line: "snapshot-create-as sweep memory --memspec $DIR/memory,snapshot=external --diskspec vda,snapshot=external,file=$DIR/overlay3"},
	{line: "domstate sweep --reason"},
	{line: "snapshot-create-as sweep live --live --memspec $DIR/memory2,snapshot=external --diskspec vda,snapshot=external,file=$DIR/overlay4"},
	{line: "domstate sweep --reason"},
	{line: "snapshot-list sweep --tree"},
	{line: "snapshot-revert sweep memory", mayFail: true},
	{line: "snapshot-delete sweep live", mayFail: true},
	{line: "snapshot-delete sweep memory", mayFail: true},
	{line: "snapshot-delete sweep live --metadata", mayFail: true}, // in case it couldn't
	{line: "snapshot-delete sweep memory --metadata", mayFail: true},
	{line: "domblklist sweep"},
	{line: "blockcopy sweep vda --dest $DIR/copy --format qcow2 --wait --pivot --transient-job"},
	{line: "domblklist sweep"},
	{line: "blockcopy sweep vda --dest $DIR/copy2 --format qcow2 --wait --transient-job"},
	{line: "blockjob sweep vda --info", mask: numbers},
	{line: "blockjob sweep vda --abort"},
	{line: "blockjob sweep vda --info"},
	{line: "blockresize sweep vda 8M"},
	{line: "blkdeviotune sweep vda --total-iops-sec 1000 --total-iops-sec-max 2000"},
	{line: "blkdeviotune sweep vda"},
	{line: "blkdeviotune sweep vda --total-iops-sec 0 --total-iops-sec-max 0"},
	{line: "checkpoint-create-as sweep mark"},
	{line: "checkpoint-list sweep"},
	{line: "backup-begin sweep $DIR/push.xml"},
	{line: "domjobinfo sweep", until: "None"},
	{line: "backup-begin sweep $DIR/pull.xml"},
	{line: "backup-dumpxml sweep"},
	{line: "domjobabort sweep"},
	{line: "domjobinfo sweep", until: "None"},
	{line: "checkpoint-delete sweep mark"},
	{line: "change-media sweep hdc $DIR/cd.iso --insert --live"},
	{line: "change-media sweep hdc --eject --live"},
	{line: "change-media sweep hdc $DIR/cd.iso --update --live"},
	{line: "change-media sweep hdc $DIR/no.iso --update --live", mayFail: true},
	{line: "domblklist sweep"},

	// Devices that come and go. The guest answers no request to give back a PCI device: a reset takes it away.
	{line: "attach-device sweep $DIR/usb.xml --live"},
	{line: "detach-disk sweep sda --live"},
	{line: "attach-device sweep $DIR/tablet.xml --live"},
	{line: "detach-device-alias sweep ua-tablet --live"},
	{line: "attach-device sweep $DIR/usbnic.xml --live"}, // a tap, which comes to QEMU as a descriptor
	{line: "domiflist sweep"},
	{line: "detach-interface sweep ethernet --mac 52:54:00:00:01:01 --live"},
	{line: "attach-interface sweep bridge none --live", mayFail: true}, // needs a bridge of the machine's
	{line: "domiflist sweep"},
	{line: "attach-disk sweep $DIR/added vdb --subdriver qcow2 --live"},
	{line: "attach-disk sweep $DIR/added vdb --subdriver qcow2 --live", mayFail: true},
	{line: "attach-disk sweep $DIR/no-such-disk vdc --live", mayFail: true},
	{line: "attach-device sweep $DIR/rng.xml --live"},
	{line: "domblklist sweep"},
	{line: "detach-disk sweep vdb --live"},
	{line: "domblklist sweep"},
	{line: "detach-device sweep $DIR/rng.xml --live"},
	{line: "reset sweep"},
	{line: "domblklist sweep", until: "copy\n hdc"},
	{line: "update-device sweep $DIR/nic.xml --live"},
	{line: "domif-getlink sweep 52:54:00:00:01:00"},
	{line: "domif-setlink sweep 52:54:00:00:01:00 up"},
	{line: "domif-getlink sweep 52:54:00:00:01:00"},
	{line: "iothreadadd sweep 1"},
	{line: "iothreadinfo sweep"},
	{line: "iothreadpin sweep 1 0"},
	{line: "iothreadset sweep 1 --poll-max-ns 1000"},
	{line: "iothreaddel sweep 1"},
	{line: "setmem sweep 24M --live"},
	{line: "setmem sweep 32M --live"},
	{line: "setvcpus sweep 2 --live"},
	{line: "vcpucount sweep"},
	{line: "setvcpus sweep 1 --live", mayFail: true},

	// Keys, pictures, interruptions.
	{line: "screenshot sweep $DIR/screen", do: screenshot},
	{line: "send-key sweep KEY_LEFTCTRL KEY_A"},
	{line: "send-key sweep KEY_NO_SUCH_KEY", mayFail: true},
	{line: "send-process-signal sweep 1 sigterm", mayFail: true},
	{line: "reboot sweep --mode acpi"},
	{line: "shutdown sweep --mode acpi"},
	{line: "reset sweep"},
	{line: "domstate sweep --reason"},
	{line: "migrate-setmaxdowntime sweep 300"},
	{line: "migrate-getmaxdowntime sweep"},
	{line: "migrate-setspeed sweep 100"},
	{line: "migrate-getspeed sweep"},
	{line: "migrate-compcache sweep"},
	{line: "migrate sweep qemu:///system --live --unsafe", mayFail: true},
	{line: "migrate sweep qemu+unix:///system?socket=/no/such/socket --live --unsafe --p2p", mayFail: true},
	{line: "domstate sweep --reason"},
	{line: "clock", do: clockIsKept},
	{line: "inject-nmi sweep"},
	{line: "reset sweep"},
	{line: "destroy sweep"},
	{line: "destroy sweep", mayFail: true},
	{line: "domstate sweep --reason"},
}

// screenshot takes a picture, whose size depends on how far the guest has come.
func screenshot(p *pass) (string, error) {
	out, err := virsh("screenshot", "sweep", filepath.Join(p.dir, "screen"))
	if err != nil {
		return out, err
	}
	picture, err := os.ReadFile(filepath.Join(p.dir, "screen"))
	if err == nil && len(picture) < 1000 {
		err = fmt.Errorf("the picture has only %d bytes", len(picture))
	}
	return out, err
}

// monitorEvents has virsh show QEMU's own events, of which a pause makes two, and gives which were shown.
func monitorEvents(p *pass) (string, error) {
	w := watchEvents(p.t, "qemu-monitor-event", "sweep", "--loop")
	w.until(func() { pause(p.t, p.domain, sweepPause) }, "event STOP", "event RESUME")
	w.stop()
	var shown []string
	for line := range strings.Lines(w.text()) {
		shown = append(shown, p.normalise(line, numbers))
	}
	slices.Sort(shown)
	return strings.Join(slices.Compact(shown), ""), nil
}

// clockIsKept looks at the guest's clock, which is to be kept by the shim and by nothing else.
func clockIsKept(p *pass) (string, error) {
	clock, err := p.domain.Clock()
	if err != nil {
		return "", err
	}
	defer clock.Close()
	pause(p.t, p.domain, sweepPause) // takes the anchor, if nothing else has
	before := offset(p.t, clock)
	pauses(p.t, p.domain, 20, sweepPause)
	drift := offset(p.t, clock) - before
	if !p.shim {
		if drift < 20*int64(sweepPause) {
			p.t.Errorf("the guest lost only %d ns", drift)
		}
		return "", nil
	}
	check.Within(p.t, drift, maxDrift, "drift after 20 checkpoints")
	domaintest.NoBacksteps(p.t, clock)
	s := status(p.t, p.domain)
	s.Records = nil
	if s.State != control.Correcting || s.Disagreements != 0 || s.Dropped+s.Anchored < 20 {
		p.t.Errorf("status: %+v", s)
	}
	p.t.Logf("%d pauses: %d dropped, %d anchored, %d held, %d passed", s.Pauses, s.Dropped, s.Anchored, s.Held, s.Passed)
	return "", nil
}
