package initramfs

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// bsdtar, busybox and cpio read the format; what cpio lists is what was packed.
func TestArchive(t *testing.T) {
	var a Archive
	a.Add("init", []byte("abc"))
	a.Add("modules/one.ko", []byte("defgh"))
	a.Add("modules/two.ko", nil)
	packed := a.Bytes()
	if len(packed)%4 != 0 || !bytes.HasPrefix(packed, []byte("070701")) {
		t.Errorf("%d bytes, beginning with %q", len(packed), packed[:6])
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("cpio is missing; fix: apt-get install cpio")
	}
	list := exec.Command("cpio", "--list", "--quiet")
	list.Stdin = bytes.NewReader(packed)
	out, err := list.CombinedOutput()
	if got := strings.Fields(string(out)); err != nil || strings.Join(got, " ") != "dev dev/console init modules modules/one.ko modules/two.ko" {
		t.Errorf("%v: %q", err, got)
	}
}
