package ui

import (
	"errors"
	"fmt"
	"math"
	"os"
	"testing"

	"libvirt.org/go/libvirt"
)

func TestSayError(t *testing.T) {
	lv := libvirt.Error{Code: libvirt.ERR_NO_DOMAIN, Message: "Domain not found: 'x'\n"}
	other := libvirt.Error{Code: libvirt.ERR_AUTH_FAILED, Message: "access ('denied')"}
	for _, test := range []struct {
		err  error
		want string
	}{
		{errors.New("plain"), "plain"},
		{lv, "Domain not found: 'x'"},
		{fmt.Errorf("looking: %w", lv), "looking: Domain not found: 'x'"},
		{Hinted(errors.Join(fmt.Errorf("one: %w", lv), fmt.Errorf("two: %w", other)), "h"), "one: Domain not found: 'x'; two: access ('denied')"},
		{errors.New("a\x1b[31m\nb"), "a [31m; b"},
	} {
		if got := ErrorText(test.err); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

func TestShellWord(t *testing.T) {
	for word, want := range map[string]string{"web-1.example": "web-1.example", "": "''", "two words": "'two words'", "it's": `'it'\''s'`, "$(x)": "'$(x)'"} {
		if got := ShellWord(word); got != want {
			t.Errorf("%q: got %s, want %s", word, got, want)
		}
	}
}

func TestNoColour(t *testing.T) {
	t.Setenv("NO_COLOR", "1")
	if u := New(os.Stdout, os.Stderr); u.Colour {
		t.Error("colour with NO_COLOR")
	}
}

func TestSayNS(t *testing.T) {
	for _, test := range []struct {
		ns   uint64
		want string
	}{
		{0, "0 ns"},
		{1, "1 ns"},
		{999, "999 ns"},
		{1_000, "1.00 µs"},
		{9_994, "9.99 µs"},
		{9_996, "10.0 µs"},
		{99_960, "100 µs"},
		{999_499, "999 µs"},
		{999_500, "1.00 ms"},
		{5_010_000, "5.01 ms"},
		{599_123_456, "599 ms"},
		{999_499_999, "999 ms"},
		{999_500_000, "0.99 s"},
		{1_000_000_000, "1.00 s"},
		{59_999_999_999, "59.99 s"},
		{60_000_000_000, "1m00s"},
		{3_599_999_999_999, "59m59s"},
		{3_600_000_000_000, "1h00m"},
		{100 * 3_600_000_000_000, "4d04h"},
		{math.MaxUint64, "213503d23h"},
	} {
		if got := Duration(test.ns); got != test.want {
			t.Errorf("%d: got %q, want %q", test.ns, got, test.want)
		}
	}
}

func TestSignedNS(t *testing.T) {
	for ns, want := range map[int64]string{0: "0 ns", 7: "+7 ns", -7: "-7 ns", -2_500: "-2.50 µs", math.MinInt64: "-106751d23h"} {
		if got := Signed(ns); got != want {
			t.Errorf("%d: got %q, want %q", ns, got, want)
		}
	}
}
