package measure

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// CPU is the processor time of processes so far, in ns (/proc/PID/task/TID/schedstat, first field).
func CPU(pids ...int) (total uint64, err error) {
	err = threads(pids, func(dir string) error {
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

// Switches counts how often the processes' threads have gone to sleep: each began with a wake-up.
func Switches(pids ...int) (total uint64, err error) {
	err = threads(pids, func(dir string) error {
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

func threads(pids []int, visit func(dir string) error) error {
	for _, pid := range pids {
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

// MemoryKiB gives a process's share of memory, and its anonymous memory, which it shares with nobody (proc(5),
// smaps_rollup).
func MemoryKiB(pid int) (pss, anonymous float64, err error) {
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
