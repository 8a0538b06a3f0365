// Package initramfs packs the few files from which a Linux kernel starts: those of the Linux guest (package linuxguest)
// and of the emulated host (package kvmhost).
package initramfs

import (
	"bytes"
	"fmt"
	"path"
)

// Archive is a cpio archive of the newc format: see the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
// The zero value has what the kernel itself wants before it starts /init: /dev/console.
type Archive struct {
	out   bytes.Buffer
	inode int
	dirs  map[string]bool
}

const (
	directory, file, device = 0o040755, 0o100755, 0o020600
)

// Add adds a file with that text and mode 0755, and the directories above it.
func (a *Archive) Add(name string, text []byte) {
	a.begin()
	a.parents(name)
	a.add(name, file, 0, 0, text)
}

// Bytes ends the archive and gives it. Nothing can be added afterwards.
func (a *Archive) Bytes() []byte {
	a.begin()
	a.inode = -1
	a.add("TRAILER!!!", 0, 0, 0, nil)
	return a.out.Bytes()
}

func (a *Archive) begin() {
	if a.dirs != nil {
		return
	}
	a.dirs = map[string]bool{".": true}
	a.parents("dev/console")
	a.add("dev/console", device, 5, 1, nil)
}

func (a *Archive) parents(name string) {
	if dir := path.Dir(name); !a.dirs[dir] {
		a.parents(dir)
		a.dirs[dir] = true
		a.add(dir, directory, 0, 0, nil)
	}
}

func (a *Archive) add(name string, mode, major, minor int, text []byte) {
	a.inode++
	fmt.Fprintf(&a.out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.inode, mode, 0, 0, 1, 0,
		len(text), 0, 0, major, minor, len(name)+1, 0)
	a.out.WriteString(name + "\x00")
	a.pad()
	a.out.Write(text)
	a.pad()
}

func (a *Archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}
