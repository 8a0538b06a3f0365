package qemuplugin

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// What the module finds out about the guest's clocks, against a simulated vCPU (clocks_test.c).
func TestClocks(t *testing.T) {
	program := filepath.Join(t.TempDir(), "clocks_test")
	compile(t, "-O2", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-o", program, "clocks_test.c", "clocks.c")
	if out, err := exec.Command(program).CombinedOutput(); err != nil {
		t.Errorf("clocks_test: %v\n%s", err, out)
	}
}
