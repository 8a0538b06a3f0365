package shim

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"ftclock/clockpage"
	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// The kernel is asked at a cont, if its last answer is old, and not at all for a guest that follows nothing.
func TestHostClock(t *testing.T) {
	var kernel host.Clock
	var asked int
	var failure error
	hostClock = func() (host.Clock, error) { asked++; return kernel, failure }
	defer func() { hostClock = host.ReadClock }()

	_, page := newPage(t, clockpage.Minor)
	policy := metadata.Default()
	policy.Reference = metadata.UTC
	d, err := newDomain(zerolog.Nop(), memory{Clock: policy.XML()}, func(memory) {})
	if err != nil {
		t.Fatal(err)
	}
	d.page = page
	second := uint64(time.Second)
	for i, step := range []struct {
		at       uint64
		kept     bool
		bound    time.Duration
		failure  error
		asked    int
		synced   uint32
		error    time.Duration
		warnings int
	}{
		{100 * second, true, 1500 * time.Microsecond, nil, 1, 1, 1500 * time.Microsecond, 0},
		{101 * second, false, 9 * time.Second, nil, 1, 1, 1500 * time.Microsecond, 0}, // not asked yet
		{116 * second, false, 9 * time.Second, nil, 2, 0, 9 * time.Second, 1},
		{140 * second, false, 16 * time.Second, nil, 3, 0, 16 * time.Second, 1}, // said already
		{900 * second, true, 2 * time.Millisecond, nil, 4, 1, 2 * time.Millisecond, 1},
		{999 * second, false, 16 * time.Second, nil, 5, 0, 16 * time.Second, 2},
		{1999 * second, true, 0, errors.New("not permitted"), 6, 0, 16 * time.Second, 3},
	} {
		kernel, failure = host.Clock{Synchronised: step.kept, MaximumError: int64(step.bound)}, step.failure
		d.checkHost(step.at)
		said, err := page.Host()
		if err != nil || asked != step.asked || said.Synchronised != step.synced || said.Error != uint64(step.error) ||
			len(d.warnings) != step.warnings {
			t.Errorf("step %d: asked %d times, page says %+v, %v; warnings %q", i, asked, said, err, d.warnings)
		}
	}
	if !strings.Contains(d.warnings[0], "may be off UTC by 9s") || !strings.Contains(d.warnings[1], "nobody knows") ||
		!strings.Contains(d.warnings[2], "not permitted") {
		t.Errorf("warnings: %q", d.warnings)
	}

	policy.Reference = metadata.Raw
	d.policy = &policy
	d.checkHost(9999 * second)
	d.policy = nil
	d.checkHost(99999 * second)
	if asked != 6 {
		t.Errorf("asked %d times, for a guest that follows nothing", asked)
	}
}

// The policy's slew bound goes into the page, and its default where it names none.
func TestSlewInThePage(t *testing.T) {
	for _, c := range []struct {
		clock string
		want  clockpage.Policy
	}{
		{`<clock reference="utc"/>`, clockpage.Policy{Reference: 1, SlewPPM: 500}},
		{`<clock reference="utc" slew="20ppm"/>`, clockpage.Policy{Reference: 1, SlewPPM: 20}},
		{`<clock/>`, clockpage.Policy{SlewPPM: 500}},
	} {
		_, page := newPage(t, clockpage.Minor)
		d, err := newDomain(zerolog.Nop(), memory{Clock: c.clock}, func(memory) {})
		if err != nil {
			t.Fatal(err)
		}
		d.page = page
		d.apply()
		got, err := page.Policy()
		if err != nil || got.SlewPPM != c.want.SlewPPM || got.Reference != c.want.Reference {
			t.Errorf("%s: %+v, %v", c.clock, got, err)
		}
	}
}
