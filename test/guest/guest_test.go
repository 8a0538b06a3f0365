package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

func needGCC(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("gcc is missing; fix: apt-get install gcc")
	}
}

func TestBuild(t *testing.T) {
	needGCC(t)
	dir := t.TempDir()
	path, err := Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	elf, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The Multiboot specification wants the header in the first 8192 bytes, 32-bit aligned.
	at := strings.Index(string(elf[:min(len(elf), 8192)]), "\x02\xb0\xad\x1b")
	if at < 0 || at%4 != 0 {
		t.Errorf("multiboot header at %d", at)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 1 {
		t.Errorf("build left %q behind", left)
	}
}

func TestRecordLayout(t *testing.T) {
	needGCC(t)
	var r record
	asserts := "#include <stddef.h>\n#include \"guest.c\"\n" +
		fmt.Sprintf("_Static_assert(sizeof(struct record) == %d, \"size\");\n", unsafe.Sizeof(r))
	for field, offset := range map[string]uintptr{
		"magic": unsafe.Offsetof(r.Magic), "sequence": unsafe.Offsetof(r.Sequence),
		"clock": unsafe.Offsetof(r.Clock), "tsc": unsafe.Offsetof(r.TSC), "largest": unsafe.Offsetof(r.Largest),
		"backsteps": unsafe.Offsetof(r.Backsteps), "largest_backstep": unsafe.Offsetof(r.LargestBackstep),
		"largest_gap": unsafe.Offsetof(r.LargestGap), "largest_gap_at": unsafe.Offsetof(r.LargestGapAt),
		"loops": unsafe.Offsetof(r.Loops), "pvclock_flags": unsafe.Offsetof(r.PvclockFlags),
		"pvclock_version": unsafe.Offsetof(r.PvclockVersion), "pvclock_updates": unsafe.Offsetof(r.PvclockUpdates),
		"pad": unsafe.Offsetof(r.Pad),
	} {
		asserts += fmt.Sprintf("_Static_assert(offsetof(struct record, %s) == %d, %q);\n", field, offset, field)
	}
	asserts += fmt.Sprintf("_Static_assert(RECORD_ADDRESS == %d && RECORD_MAGIC == %d, \"constants\");\n", recordAddress, recordMagic)
	gcc := exec.Command("gcc", append(cflags, "-fsyntax-only", "-Isrc", "-x", "c", "-")...)
	gcc.Stdin = strings.NewReader(asserts)
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
