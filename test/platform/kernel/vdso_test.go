// Needed by: the module, which reads CLOCK_MONOTONIC_RAW on QEMU's ioctl path
// and under its seccomp sandbox. The clock must come from the vDSO: no system
// call that a filter could refuse, and no entry into the kernel.

package kernel

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ftclock/test/check"
)

// A seccomp filter kills at clock_gettime. Strict mode won't do: it forbids
// rdtsc, too.
const filtered = `
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>

int main(int argc, char **argv)
{
	static const clockid_t clocks[] = {CLOCK_MONOTONIC_RAW, CLOCK_REALTIME, CLOCK_BOOTTIME};
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = {sizeof(code) / sizeof(*code), code};
	struct timespec ts;

	(void)argv;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
		return 2;
	for (unsigned i = 0; i < sizeof(clocks) / sizeof(*clocks); i++)
		if (clock_gettime(clocks[i], &ts) != 0 || (ts.tv_sec == 0 && ts.tv_nsec == 0))
			return 1;
	if (argc > 1) /* proof that the filter works */
		syscall(SYS_clock_gettime, CLOCK_MONOTONIC_RAW, &ts);
	puts("read");
	return 0;
}
`

func TestClocksNeedNoSystemCall(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("gcc is missing; fix: apt-get install gcc libc6-dev")
	}
	source, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if name := strings.TrimSpace(string(source)); err == nil && (name == "hpet" || name == "acpi_pm") {
		t.Skipf("this machine's clocksource is %s, which the vDSO can't read; fix: a machine whose TSC is stable", name)
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "filtered")
	gcc := exec.Command("gcc", "-D_GNU_SOURCE", "-O2", "-Wall", "-o", program, "-x", "c", "-")
	gcc.Stdin = strings.NewReader(filtered)
	check.Output(t, gcc)
	if out, err := exec.Command(program).Output(); err != nil || string(out) != "read\n" {
		t.Errorf("reading the clocks without system calls: %v, %q", err, out)
	}
	if err := exec.Command(program, "by system call").Run(); err == nil || !strings.Contains(err.Error(), "bad system call") {
		t.Errorf("the filter lets clock_gettime through: %v", err)
	}
}
