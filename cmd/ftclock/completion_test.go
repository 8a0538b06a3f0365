package main

import (
	"strings"
	"testing"

	"ftclock/cmd/ftclock/internal/ui"
)

// What a shell is told at each place of a line.
func TestCompletion(t *testing.T) {
	holdMock(t)
	for _, test := range []struct{ line, point, want string }{
		{"ftclock en", "", "enable"},
		{"ftclock", "", "enable disable attach detach node anchor status watch report policy doctor verify exporter exercise version"},
		{"ftclock anchor i", "", "import"},
		{"ftclock enable ", "", mockDomain},
		{"ftclock enable x", "", ""},
		{"ftclock verify --pauses 5 ", "", mockDomain},
		{"ftclock enable test ", "", ""},
		{"ftclock enable --re", "", "--reference --required"},
		{"ftclock --conn", "", "--connect"},
		{"ftclock enable --reference ", "", "raw utc"},
		{"ftclock enable --reference=u", "", "utc"},
		{"ftclock enable --checkpoint-limit ", "", ""},
		{"ftclock exporter --web", "", "--web.listen-address --web.systemd-socket --web.config.file"},
		{"ftclock -c qemu+ssh://a/system -c qemu+ssh://b/system st", "", "status"},
		{"ftclock -c test:///default status --format j", "", "json"},
		{"ftclock en test --live", "10", "enable"},
	} {
		t.Setenv("COMP_LINE", test.line)
		t.Setenv("COMP_POINT", test.point)
		stdout, stderr, code := told("status")
		if got := strings.Join(strings.Fields(stdout), " "); got != test.want || stderr != "" || code != ui.ExitOK {
			t.Errorf("%q: %q (%d, %s), want %q", test.line, got, code, stderr, test.want)
		}
	}
}
