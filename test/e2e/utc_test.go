package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"ftclock/test/built"
	"ftclock/test/check"
	"ftclock/test/domaintest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

const utcElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="utc"/>`

// fakeClock has the domain's QEMU believe in a host whose clock is disciplined, by so many ppm. The machine's own clock can't be
// set for a test, and no namespace covers it.
func fakeClock(t *testing.T, x *libvirtxml.Domain, ppm int) {
	t.Helper()
	preloadFakeClock(t, x, "FAKECLOCK_PPM", ppm)
}

func preloadFakeClock(t *testing.T, x *libvirtxml.Domain, variable string, ppm int) {
	t.Helper()
	dir := check.Value(privatelibvirt.QEMUDir("fakeclock"))(t)
	library := check.Value(built.Copy(built.FakeClock, dir))(t)
	privatelibvirt.SetEnvironment(x, [2]string{"LD_PRELOAD", library}, [2]string{variable, fmt.Sprint(ppm)})
}

// A guest follows the disciplined clock of its host, faster than the crystal and slower, as seen from outside QEMU.
func TestKVMFollowsTheDisciplinedClock(t *testing.T) {
	for _, ppm := range []int{200, -200} {
		t.Run(fmt.Sprint(ppm), func(t *testing.T) {
			x := managed("follows", utcElement)
			fakeClock(t, x, ppm)
			d, clock := start(t, x)
			// The guest booted and ran meanwhile: what it lacks since is paid within the slew bound.
			settle := func() (lastCont uint64) {
				for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
					pause(t, d, 8*time.Millisecond)
					time.Sleep(20 * time.Millisecond)
					if s := status(t, d); s.Follow != nil && s.Follow.Debt == 0 && s.Anchor.Valid == 1 {
						return s.Records[len(s.Records)-1].ContRaw
					}
				}
				t.Fatalf("the guest doesn't catch up with its reference: %+v", status(t, d).Follow)
				return 0
			}
			first := settle()
			before := offset(t, clock)
			for range 200 {
				pause(t, d, 8*time.Millisecond)
				time.Sleep(20 * time.Millisecond)
			}
			last := settle()
			gained := before - offset(t, clock)
			want := int64(last-first) * int64(ppm) / 1_000_000
			t.Logf("gained %d ns on the crystal in %v, want %d", gained, time.Duration(last-first), want)
			check.Within(t, gained-want, maxDrift, "the guest is off its reference")
			domaintest.NoBacksteps(t, clock)
			s := status(t, d)
			if s.Disagreements != 0 || s.Reanchored != 0 || s.Passed > 1 || s.Follow.Steps != 0 || s.Follow.GivenUp != 0 || s.WorstResidual > 100_000 {
				s.Records = nil
				t.Errorf("status: %+v, %+v", s, s.Follow)
			}
		})
	}
}

// With the host's clock as it is the guest is kept as well as by the crystal, and status says how good that clock is.
func TestKVMFollowsTheHostsClock(t *testing.T) {
	d, clock := start(t, managed("utc", utcElement))
	if wrong := checkpoints(t, clock, d.Suspend, d.Resume); strings.Contains(wrong, "back") {
		t.Error(wrong)
	}
	s := status(t, d)
	if s.Host == nil || s.Follow == nil {
		t.Fatalf("status: %+v", s)
	}
	warned := strings.Contains(strings.Join(s.Warnings, "\n"), "isn't synchronised")
	if warned == (s.Host.Synchronised == 1) {
		t.Errorf("synchronised: %v, warnings %q", s.Host.Synchronised, s.Warnings)
	}
	// Each record has the bound that the kernel gave, which grows by 500 ppm until it is asked again.
	known := 0
	for _, r := range s.Records {
		if r.ContRaw < s.Host.AtRaw {
			continue
		}
		known++
		if want := s.Host.Error + (r.ContRaw-s.Host.AtRaw)/1_000_000*500; r.Error != want {
			t.Errorf("pause %d: the record's error is %d ns, want %d", r.Number, r.Error, want)
		}
	}
	if known == 0 || s.Host.Error == 0 {
		t.Errorf("nobody asked how good the host's clock is: %+v", s.Host)
	}
	if s.Follow.Debt > 1000 || s.Follow.Debt < -1000 || s.Follow.GivenUp != 0 {
		t.Errorf("follows: %+v", s.Follow)
	}
	t.Logf("host: %+v, follow: %+v, worst residual %d ns", s.Host, s.Follow, s.WorstResidual)
}
