package main

import (
	"os"
	"strings"
	"testing"
)

func TestGuestName(t *testing.T) {
	for cmdline, want := range map[string]string{
		"qemu\x00-name\x00guest=web,debug-threads=on\x00-S\x00": "web",
		"qemu\x00-name\x00web\x00":                              "web",
		"qemu\x00-name\x00guest=a,,b,process=x\x00":             "a,b",
		"qemu\x00-S\x00":                                        "",
		"qemu\x00-name":                                         "",
		"":                                                      "",
	} {
		if got := guestName([]byte(cmdline)); got != want {
			t.Errorf("%q: %q, want %q", cmdline, got, want)
		}
	}
}

func TestFindProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root; fix: run the tests as root")
	}
	for _, pid := range []int{-1, 0, 1, 1 << 22} {
		if _, err := findProcess(pid); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%d: %v", pid, err)
		}
	}
}
