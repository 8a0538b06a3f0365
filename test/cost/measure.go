package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ftclock/control"
	"ftclock/keeper"
	"ftclock/spawn"
	"ftclock/test/qmp"
)

const (
	rounds      = 40
	perRound    = 100 // round trips of each kind in a round
	checkpoints = 500
	idle        = 10 * time.Second
	uuid        = "6695eb01-f6a4-8304-79aa-97f2502e193f"
)

// rig is a QEMU, a shim before it, and a socat before it.
type rig struct {
	dir     string
	stop    []func()
	direct  *qmp.Conn
	shim    *qmp.Conn
	socat   *qmp.Conn
	pids    []int // of the shim's pair
	program string
}

func measure(out io.Writer) (err error) {
	r := &rig{}
	defer func() {
		for _, stop := range slices.Backward(r.stop) {
			stop()
		}
	}()
	if err := r.start(); err != nil {
		return err
	}
	fmt.Fprintf(out, "QMP round trips (query-status), median of %d each, taking turns:\n", rounds*perRound)
	trips, err := r.roundTrips()
	if err != nil {
		return err
	}
	for _, name := range []string{"direct", "socat", "shim"} {
		fmt.Fprintf(out, "  %-7s %7.1f µs   × %.2f\n", name, trips[name].Seconds()*1e6, trips[name].Seconds()/trips["direct"].Seconds())
	}

	before, err := r.cpu()
	if err != nil {
		return err
	}
	for range checkpoints {
		for _, command := range []string{"stop", "cont"} {
			if _, err := r.shim.Execute(command, nil); err != nil {
				return err
			}
		}
	}
	after, err := r.cpu()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "processor time of the pair for a checkpoint (stop and cont): %.0f µs, mean of %d\n",
		float64(after-before)/1e3/checkpoints, checkpoints)

	time.Sleep(time.Second)
	first, err := r.switches()
	if err != nil {
		return err
	}
	time.Sleep(idle)
	last, err := r.switches()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "wake-ups of the pair when nothing passes: %d in %v\n", last-first, idle)

	var all, own float64
	for i, name := range []string{"keeper", "worker"} {
		pss, anonymous, err := memoryKiB(r.pids[i])
		if err != nil {
			return err
		}
		all, own = all+pss, own+anonymous
		fmt.Fprintf(out, "memory of the %s (PSS): %.1f MiB, of which %.1f MiB are its own\n", name, pss/1024, anonymous/1024)
	}
	fmt.Fprintf(out, "memory of the pair (PSS): %.1f MiB for the first domain, %.1f MiB for each further one, which shares the program\n",
		all/1024, own/1024)
	return nil
}

func (r *rig) run(name string, env []string, files []*os.File, args ...string) (*exec.Cmd, error) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), env...)
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r.stop = append(r.stop, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, nil
}

func (r *rig) start() (err error) {
	for _, needed := range []string{"qemu-system-x86_64", "socat"} {
		if _, err := exec.LookPath(needed); err != nil {
			return fmt.Errorf("%w; fix: apt-get install qemu-system-x86 socat", err)
		}
	}
	if r.program, err = filepath.Abs("bin/ftclock-shim"); err != nil {
		return err
	}
	if r.dir, err = os.MkdirTemp("", "ftclock-cost-"); err != nil {
		return err
	}
	r.stop = append(r.stop, func() { _ = os.RemoveAll(r.dir) })
	path := func(name string) string { return filepath.Join(r.dir, name) }

	// QEMU listens on monitor.sock, as under libvirt, which is renamed, as by the hook. A second monitor is for the direct
	// connection and a third for socat's: a monitor has one client.
	monitor := func(id string) []string {
		return []string{"-chardev", "socket,id=" + id + ",path=" + path(id+".sock") + ",server=on,wait=off", "-mon", "chardev=" + id + ",mode=control"}
	}
	args := []string{"-accel", "kvm", "-machine", "pc", "-m", "16", "-nodefaults", "-display", "none"}
	for _, id := range []string{"monitor", "direct", "socat"} {
		args = append(args, monitor(id)...)
	}
	qemu, err := r.run("qemu-system-x86_64", nil, nil, args...)
	if err != nil {
		return err
	}
	for _, id := range []string{"monitor", "direct", "socat"} {
		if err := await(path(id + ".sock")); err != nil {
			return err
		}
	}
	if err := os.Rename(path("monitor.sock"), path("monitor.qemu")); err != nil {
		return err
	}
	if err := os.WriteFile(path("qemu.pid"), []byte(strconv.Itoa(qemu.Process.Pid)), 0o600); err != nil {
		return err
	}
	if _, err := r.run("socat", nil, nil, "UNIX-LISTEN:"+path("via-socat"), "UNIX-CONNECT:"+path("socat.sock")); err != nil {
		return err
	}
	module, err := filepath.Abs("bin/libftclock-qemu.so")
	if err != nil {
		return err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	_, err = r.run(r.program, []string{keeper.EnvFDs + "=" + spawn.Ready + "=3"}, []*os.File{theirs}, keeper.KeeperFlag,
		"-uuid", uuid, "-name", "cost", "-clock", `<clock xmlns="urn:ftclock:domain:1"/>`, "-module", module,
		"-domain-dir", r.dir, "-pid-file", path("qemu.pid"),
		"-state", path("state"), "-last-stops", path("stops"))
	theirs.Close()
	if err != nil {
		return err
	}
	line := make([]byte, 512)
	if n, _ := ready.Read(line); string(line[:n]) != "ready\n" {
		return fmt.Errorf("the shim says: %s", line[:n])
	}
	for to, socket := range map[**qmp.Conn]string{&r.direct: "direct.sock", &r.socat: "via-socat", &r.shim: "monitor.sock"} {
		if err := await(path(socket)); err != nil {
			return err
		}
		if *to, err = qmp.Dial(path(socket), 10*time.Second); err != nil {
			return fmt.Errorf("%s: %w", socket, err)
		}
	}
	// The first cont has the module loaded.
	if _, err := r.shim.Execute("cont", nil); err != nil {
		return err
	}
	answer, err := control.Ask(path("state"), uuid, control.Request{Do: "status"})
	if err != nil {
		return err
	}
	if answer.Status.State != control.Correcting {
		return fmt.Errorf("the shim is %s: %s", answer.Status.State, answer.Status.Why)
	}
	r.pids = []int{answer.Status.Keeper, answer.Status.Shim}
	return nil
}

func await(path string) error {
	for range 1000 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s doesn't appear", path)
}

// roundTrips gives the median round trip of each way.
func (r *rig) roundTrips() (map[string]time.Duration, error) {
	ways := map[string]*qmp.Conn{"direct": r.direct, "socat": r.socat, "shim": r.shim}
	all := make(map[string][]time.Duration)
	for range rounds {
		for name, conn := range ways {
			for range perRound {
				begin := time.Now()
				if _, err := conn.Execute("query-status", nil); err != nil {
					return nil, err
				}
				all[name] = append(all[name], time.Since(begin))
			}
		}
	}
	medians := make(map[string]time.Duration)
	for name, times := range all {
		slices.Sort(times)
		medians[name] = times[len(times)/2]
	}
	return medians, nil
}

// cpu is the processor time of the pair so far, in ns (/proc/PID/task/TID/schedstat, first field).
func (r *rig) cpu() (total uint64, err error) {
	err = r.threads(func(dir string) error {
		text, err := os.ReadFile(filepath.Join(dir, "schedstat"))
		if err != nil {
			return err
		}
		n, err := strconv.ParseUint(strings.Fields(string(text))[0], 10, 64)
		total += n
		return err
	})
	return total, err
}

// switches counts how often the pair's threads have gone to sleep: each began with a wake-up.
func (r *rig) switches() (total uint64, err error) {
	err = r.threads(func(dir string) error {
		text, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				total += n
				return err
			}
		}
		return errors.New("no voluntary_ctxt_switches in " + dir)
	})
	return total, err
}

func (r *rig) threads(visit func(dir string) error) error {
	for _, pid := range r.pids {
		dirs, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if err := visit(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// memoryKiB gives a process's share of memory, and its anonymous memory, which it shares with nobody (proc(5),
// smaps_rollup).
func memoryKiB(pid int) (pss, anonymous float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || err != nil {
			continue
		}
		switch fields[0] {
		case "Pss:":
			pss, err = strconv.ParseFloat(fields[1], 64)
		case "Pss_Anon:":
			anonymous, err = strconv.ParseFloat(fields[1], 64)
		}
	}
	return pss, anonymous, err
}
