package shim

import (
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	metadata "ftclock/xml-templates"
)

// The kernel is asked at a cont, if its last answer is old, and not at all for a guest that follows nothing.
func TestHostClock(t *testing.T) {
	var kernel unix.Timex
	var state, asked int
	var failure error
	adjtimex = func(x *unix.Timex) (int, error) {
		asked++
		if *x != (unix.Timex{}) {
			t.Errorf("the kernel was given %+v: it would set the clock", *x)
		}
		*x = kernel
		return state, failure
	}
	defer func() { adjtimex = unix.Adjtimex }()

	_, page := newPage(t, clockpage.Minor)
	policy := metadata.Default()
	policy.Reference = metadata.UTC
	d := testDomain(t, policy.XML())
	second := uint64(time.Second)
	for i, step := range []struct {
		at       uint64
		state    int
		status   int32
		bound    int64 // microseconds
		failure  error
		asked    int
		synced   uint32
		error    time.Duration
		warnings int
	}{
		{100 * second, unix.TIME_OK, 0, 1500, nil, 1, 1, 1500 * time.Microsecond, 0},
		{101 * second, unix.TIME_ERROR, unix.STA_UNSYNC, 9e6, nil, 1, 1, 1500 * time.Microsecond, 0}, // not asked yet
		{116 * second, unix.TIME_OK, unix.STA_UNSYNC, 9e6, nil, 2, 0, 9 * time.Second, 1},
		{140 * second, unix.TIME_ERROR, unix.STA_UNSYNC, 16e6, nil, 3, 0, 16 * time.Second, 1}, // said already
		{900 * second, unix.TIME_OK, 0, 2000, nil, 4, 1, 2 * time.Millisecond, 1},
		{999 * second, unix.TIME_ERROR, 0, 16e6, nil, 5, 0, 16 * time.Second, 2},
		{1999 * second, 0, 0, 0, errors.New("not permitted"), 6, 0, 16 * time.Second, 3},
	} {
		kernel, state, failure = unix.Timex{Status: step.status, Maxerror: step.bound}, step.state, step.failure
		d.host.check(&policy, page, step.at)
		host, err := page.Host()
		if err != nil || asked != step.asked || host.Synchronised != step.synced || host.Error != uint64(step.error) ||
			len(warnings(d)) != step.warnings {
			t.Errorf("step %d: asked %d times, page says %+v, %v; warnings %q", i, asked, host, err, warnings(d))
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
