package qemuplugin

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ftclock/host"
	"ftclock/test/built"
)

// needKVM skips the test on a machine without /dev/kvm, unless it may not be left out.
func needKVM(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
		return
	}
	_, missing := os.Stat("/dev/kvm")
	if os.Getenv("FTCLOCK_REQUIRE") == "1" || (os.Getenv("CI") == "true" && missing == nil) {
		t.Fatalf("the module's tests may not be left out here: %v", err)
	}
	t.Skipf("needs KVM (%v): load kvm_intel or kvm_amd, and run as root or as a member of group kvm", err)
}

// shipped is the path of the module as it is shipped.
func shipped(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../bin/libftclock-qemu.so")
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%v; fix: run make build in the repository's root", err)
	}
	return path
}

// fake gives the path of a program built from testdata/fake.c, and the place of its ioctl slot.
func fake(t *testing.T, name string) (path, slot string) {
	t.Helper()
	path, err := built.Path(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	var base uint64
	if f.Type == elf.ET_EXEC {
		base = f.Progs[slices.IndexFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_LOAD })].Vaddr
	}
	for _, section := range f.Sections {
		if section.Type != elf.SHT_RELA {
			continue
		}
		data, err := section.Data()
		if err != nil {
			t.Fatal(err)
		}
		for ; len(data) >= 24; data = data[24:] {
			symbol := f.ByteOrder.Uint64(data[8:]) >> 32
			if symbol > 0 && symbols[symbol-1].Name == "ioctl" {
				return path, fmt.Sprintf("%#x", f.ByteOrder.Uint64(data)-base)
			}
		}
	}
	t.Fatalf("%s has no slot for ioctl", path)
	return "", ""
}

// facts are what the fake printed: values by name, in order.
type facts map[string][]string

func run(t *testing.T, cmd *exec.Cmd) facts {
	t.Helper()
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
	}
	f := facts{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		f[name] = append(f[name], value)
	}
	return f
}

func (f facts) want(t *testing.T, name string, values ...string) {
	t.Helper()
	if !slices.Equal(f[name], values) {
		t.Errorf("%s: %q, want %q", name, f[name], values)
	}
}

// mapping gives the line of /proc/self/maps around the address that is the only value of name.
func (f facts) mapping(t *testing.T, name string) string {
	t.Helper()
	at, err := strconv.ParseUint(f[name][0], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range f["map"] {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err == nil && from <= at && at < to {
			return line
		}
	}
	t.Fatalf("%s %#x is not mapped", name, at)
	return ""
}

// untouched checks what holds with and without the module: calls that aren't its business, results and errno.
func (f facts) untouched(t *testing.T) {
	t.Helper()
	f.want(t, "version", "12 untouched")
	f.want(t, "unknown", "-1 ENOTTY")
	f.want(t, "get-no-fd", "-1 EBADF")
	f.want(t, "set-no-fd", "-1 EBADF")
	f.want(t, "get-not-vm", "-1 EINVAL") // KVM's own for a request that /dev/kvm doesn't know
	f.want(t, "get-bad-address", "-1 EFAULT")
	f.want(t, "get", "0 untouched", "0 untouched")
	f.want(t, "set", "0 untouched", "0 untouched", "0 untouched")
	f.want(t, "ctrl", "-1 EINVAL", "0 untouched", "-1 EINVAL")
	f.want(t, "msr")
}

// served checks that the module does its work in the fake.
func (f facts) served(t *testing.T) {
	t.Helper()
	f.untouched(t)
	f.want(t, "pages", "1")
	f.want(t, "memfd", "/memfd:ftclock-page (deleted)")
	f.want(t, "cloexec", "1")
	f.want(t, "head", "1")
	if len(f["seals"]) != 1 {
		t.Fatalf("seals: %q", f["seals"])
	}
	const shrinkGrowSeal = 0x7
	if seals, err := strconv.ParseUint(f["seals"][0], 0, 32); err != nil || seals&0xf != shrinkGrowSeal {
		t.Errorf("seals: %s, want shrink, grow and seal: %#x", f["seals"][0], shrinkGrowSeal)
	}
	m := f.mapping(t, "target")
	if ours := strings.Contains(m, "/libftclock-qemu") || strings.Contains(m, "/memfd:ftclock-module "); !ours || !strings.Contains(m, " r-xp ") {
		t.Errorf("the slot leads to %s", m)
	}
	f.want(t, "first", "passed reason 8")
	f.want(t, "clocks", "0", "1", "6") // none, kvmclock, Hyper-V's page and counter
	if slices.Equal(f["stable"], []string{"1", "1"}) {
		f.want(t, "caught-up", "1", "1")
		for _, p := range f["pause"] {
			if p != "dropped reason 1" && p != "anchored reason 2" {
				t.Errorf("a pause was %s", p)
			}
		}
	} else {
		t.Logf("the host's TSC isn't stable (%q): pauses were %q", f["stable"], f["pause"])
	}
	if len(f["pause"]) != 2 {
		t.Errorf("pauses: %q", f["pause"])
	}
	// The write to no descriptor came as well, and got the kernel's answer.
	f.want(t, "counts", "4 pauses, 0 busy")
}

func (f facts) readOnlySlot(t *testing.T) {
	t.Helper()
	if m := f.mapping(t, "slot"); !strings.Contains(m, " r--p ") {
		t.Errorf("the slot's page is no longer read-only: %s", m)
	}
}

// notServed checks that the module left the program alone.
func (f facts) notServed(t *testing.T) {
	t.Helper()
	f.untouched(t)
	f.want(t, "pages", "0")
	f.want(t, "caught-up", "0", "0")
	for _, m := range f["map"] {
		if strings.Contains(m, "ftclock-page") {
			t.Errorf("mapped: %s", m)
		}
	}
}

func TestKVMModule(t *testing.T) {
	needKVM(t)
	module := shipped(t)
	path, slot := fake(t, built.FakeHardened)

	t.Run("not there", func(t *testing.T) {
		f := run(t, exec.Command(path, slot))
		f.notServed(t)
		f.readOnlySlot(t)
	})
	t.Run("dlopen", func(t *testing.T) {
		f := run(t, exec.Command(path, slot, module))
		f.want(t, "dlopen1", "ok")
		f.served(t)
		f.readOnlySlot(t)
	})
	t.Run("LD_PRELOAD", func(t *testing.T) {
		cmd := exec.Command(path, slot)
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+module)
		f := run(t, cmd)
		f.served(t)
		f.readOnlySlot(t)
	})
	t.Run("dlopen twice", func(t *testing.T) {
		f := run(t, exec.Command(path, slot, module, module))
		f.want(t, "dlopen2", "ok")
		f.served(t)
		f.readOnlySlot(t)
	})
	t.Run("LD_PRELOAD and dlopen", func(t *testing.T) {
		cmd := exec.Command(path, slot, module)
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+module)
		f := run(t, cmd)
		f.served(t)
	})
	// The loader gives it to a QEMU that doesn't see the file in a memory file.
	t.Run("on top of one in a memory file", func(t *testing.T) {
		text, err := os.ReadFile(module)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := host.ConstantFile("ftclock-module", text)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(path, slot, "/proc/self/fd/3", module)
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "module")}
		defer cmd.ExtraFiles[0].Close()
		f := run(t, cmd)
		f.want(t, "dlopen2", "ok")
		f.served(t)
		f.readOnlySlot(t)
	})
	// After an upgrade the file of the same name is another one.
	t.Run("another version on top", func(t *testing.T) {
		other := filepath.Join(t.TempDir(), filepath.Base(module))
		text, err := os.ReadFile(module)
		if err == nil {
			err = os.WriteFile(other, text, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		f := run(t, exec.Command(path, slot, module, other))
		f.want(t, "dlopen2", "ok")
		f.served(t)
		f.readOnlySlot(t)
	})
}

// Other ways to link a program than the distributions'.
func TestKVMModuleInOtherPrograms(t *testing.T) {
	needKVM(t)
	module := shipped(t)
	for name, program := range map[string]string{
		"calls through the GOT":  built.FakeNoPLT,
		"lazy binding":           built.FakeLazy,
		"lazy binding, no RELRO": built.FakeLazyNoRELRO,
		"fixed address":          built.FakeFixed,
	} {
		t.Run(name, func(t *testing.T) {
			path, slot := fake(t, program)
			run(t, exec.Command(path, slot, module)).served(t)
			cmd := exec.Command(path, slot)
			cmd.Env = append(os.Environ(), "LD_PRELOAD="+module)
			run(t, cmd).served(t)
		})
	}
}

func TestKVMModuleLeavesOthersAlone(t *testing.T) {
	module := shipped(t)
	t.Run("not QEMU by its name", func(t *testing.T) {
		needKVM(t)
		path, slot := fake(t, built.FakeStranger)
		run(t, exec.Command(path, slot, module)).notServed(t)
		cmd := exec.Command(path, slot)
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+module)
		run(t, cmd).notServed(t)
	})
	t.Run("no ioctl", func(t *testing.T) {
		path, err := built.Path(built.FakeNoIOCTL)
		if err != nil {
			t.Fatal(err)
		}
		run(t, exec.Command(path, module)).want(t, "pages", "0")
	})
}

// The module exports nothing that could get in the way of QEMU's symbols, and needs nothing but libc.
func TestModuleSymbols(t *testing.T) {
	f, err := elf.Open(shipped(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range symbols {
		if s.Section != elf.SHN_UNDEF {
			t.Errorf("exports %s", s.Name)
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil || !slices.Equal(libraries, []string{"libc.so.6"}) {
		t.Errorf("needs %q, %v", libraries, err)
	}
}
