package guest

import (
	"fmt"

	"ftclock/test/built"
)

// Copy copies the built guest into dir and returns the path of the ELF file,
// to be booted as a multiboot kernel (qemu -kernel). The file is readable by
// everybody; that QEMU's user reaches dir is up to the caller.
func Copy(dir string) (string, error) {
	elf, err := built.Copy(built.Guest, dir)
	if err != nil {
		return "", fmt.Errorf("copying the guest: %w", err)
	}
	return elf, nil
}
