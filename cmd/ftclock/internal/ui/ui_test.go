package ui

import (
	"errors"
	"fmt"
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
