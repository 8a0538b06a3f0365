package spawn

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// FindQEMU finds a domain's QEMU by the pid file that libvirt keeps in the directory run, and proves that it is it. root is "/"
// but in tests.
func FindQEMU(root, run, name, uuid string) (int, error) {
	file := PIDFile(filepath.Join(root, run), name)
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("finding the QEMU of %s: %w", name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("finding the QEMU of %s: %s holds no pid", name, file)
	}
	proc := filepath.Join(root, "proc", strconv.Itoa(pid))
	exe, err := os.Readlink(filepath.Join(proc, "exe"))
	if err != nil {
		return 0, fmt.Errorf("finding the QEMU of %s: %w", name, err)
	}
	program := strings.TrimSuffix(filepath.Base(exe), " (deleted)") // after an upgrade of QEMU's package
	if !strings.Contains(program, "qemu") && program != "kvm" {
		return 0, fmt.Errorf("finding the QEMU of %s: process %d is %s, not QEMU", name, pid, exe)
	}
	cmdline, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return 0, fmt.Errorf("finding the QEMU of %s: %w", name, err)
	}
	if !isQEMUOf(cmdline, name, uuid) {
		return 0, fmt.Errorf("finding the QEMU of %s: process %d is the QEMU of another domain", name, pid)
	}
	return pid, nil
}

// isQEMUOf tells whether a QEMU's command line, as libvirt writes it, is for this domain.
func isQEMUOf(cmdline []byte, name, uuid string) bool {
	var args []string
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		args = append(args, string(arg))
	}
	if i := slices.Index(args, "-uuid"); i >= 0 && i+1 < len(args) {
		return args[i+1] == uuid
	}
	i := slices.Index(args, "-name")
	if i < 0 || i+1 >= len(args) {
		return false
	}
	guest := "guest=" + strings.ReplaceAll(name, ",", ",,")
	rest, ok := strings.CutPrefix(args[i+1], guest)
	return ok && (rest == "" || strings.HasPrefix(rest, ",") && !strings.HasPrefix(rest, ",,"))
}
