package shim

import (
	"errors"
	"strings"
	"testing"
	"time"

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
	d := testDomain(t, policy.XML())
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
		d.host.check(&policy, page, step.at)
		said, err := page.Host()
		if err != nil || asked != step.asked || said.Synchronised != clockpage.Flag32(step.synced) || said.Error != uint64(step.error) ||
			len(warnings(d)) != step.warnings {
			t.Errorf("step %d: asked %d times, page says %+v, %v; warnings %q", i, asked, said, err, warnings(d))
		}
	}
	if said := warnings(d); !strings.Contains(said[0], "may be off UTC by 9s") || !strings.Contains(said[1], "nobody knows") ||
		!strings.Contains(said[2], "not permitted") {
		t.Errorf("warnings: %q", said)
	}

	policy.Reference = metadata.Raw
	d.host.check(&policy, page, 9999*second)
	d.host.check(nil, page, 99999*second)
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
		testDomain(t, c.clock).resume(page, true)
		got, err := page.Policy()
		if err != nil || got.SlewPPM != c.want.SlewPPM || got.Reference != c.want.Reference {
			t.Errorf("%s: %+v, %v", c.clock, got, err)
		}
	}
}
