package guest

import (
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed src
var sources embed.FS

// RecordHeader is record.h, for other guests that publish clocks.
//
//go:embed src/record.h
var RecordHeader []byte

// cflags keep the guest to plain integer instructions of the i386, each of
// which any emulator of KVM knows.
var cflags = []string{
	"-m32", "-march=i386", "-mgeneral-regs-only", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror",
	"-ffreestanding", "-fno-pic", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
	"-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
}

// Build compiles the guest with gcc into dir and returns the path of the ELF
// file, to be booted as a multiboot kernel (qemu -kernel). The file is
// readable by everybody; that QEMU's user reaches dir is up to the caller.
func Build(dir string) (string, error) {
	src, err := os.MkdirTemp(dir, "guest-source-")
	if err != nil {
		return "", fmt.Errorf("building guest: %w", err)
	}
	defer os.RemoveAll(src)
	if err := os.CopyFS(src, sources); err != nil {
		return "", fmt.Errorf("building guest: %w", err)
	}
	elf := filepath.Join(dir, "guest.elf")
	args := append([]string{"-o", elf, "-T", filepath.Join(src, "src", "guest.ld")}, cflags...)
	args = append(args, filepath.Join(src, "src", "start.S"), filepath.Join(src, "src", "guest.c"))
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("building guest: gcc: %w\n%s", err, out)
	}
	if err := os.Chmod(elf, 0o644); err != nil {
		return "", fmt.Errorf("building guest: %w", err)
	}
	return elf, nil
}
