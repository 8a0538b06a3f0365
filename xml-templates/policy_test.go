package metadata

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// randomPolicy is a valid one.
func randomPolicy(r *rand.Rand) Policy {
	limit := func() time.Duration {
		step := []time.Duration{1, time.Microsecond, time.Millisecond, time.Second, time.Minute}[r.IntN(5)]
		d := time.Duration(r.Int64N(int64(MaxLimit))) / step * step
		return min(max(d, MinLimit), MaxLimit)
	}
	rule := func(optional bool) Rule {
		switch {
		case r.IntN(2) == 0:
			return Rule{Hold, 0}
		case optional && r.IntN(2) == 0:
			return Rule{CatchUp, 0}
		}
		return Rule{CatchUp, limit()}
	}
	return Policy{
		Reference:  Reference(r.IntN(2)),
		Slew:       []uint32{0, MinSlew, 499, 501, MaxSlew}[r.IntN(5)],
		Monitor:    Monitor(r.IntN(2)),
		Required:   r.IntN(2) == 0,
		Checkpoint: Rule{Action(r.IntN(2)), limit()},
		Suspend:    rule(true),
		Restore:    rule(true),
		Migrate:    rule(false),
	}
}

func TestPolicyXML(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		p := randomPolicy(r)
		got, err := ParseElement([]byte(p.XML()))
		if err != nil || got != p {
			t.Fatalf("%+v became %+v, %v by\n%s", p, got, err, p.XML())
		}
	}
	for _, tt := range []struct {
		policy Policy
		want   string
	}{
		{Default(), `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`},
		{policy(func(p *Policy) { p.Reference, p.Required = UTC, false }),
			`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" reference="utc" required="no"/>`},
		{policy(func(p *Policy) { p.Slew, p.Monitor, p.Required = 9, Direct, false }),
			`<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1" slew="9ppm" monitor="direct" required="no"/>`},
		{policy(func(p *Policy) {
			p.Checkpoint.Limit = 1500 * time.Millisecond
			p.Restore = Rule{CatchUp, 2 * time.Minute}
			p.Migrate = Rule{Hold, 0}
		}), `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">
  <ftclock:on event="checkpoint" limit="1.5s"/>
  <ftclock:on event="restore" do="catch-up" limit="2m"/>
  <ftclock:on event="migrate" do="hold"/>
</ftclock:clock>`},
	} {
		if got := tt.policy.XML(); got != tt.want {
			t.Errorf("got\n%s\nwant\n%s", got, tt.want)
		}
	}
}

// What a program may put together but no element means is refused, not written as something else.
func TestPolicyRefused(t *testing.T) {
	const clock = "checking policy: /ftclock:clock"
	const on = clock + "/ftclock:on[1]"
	for _, tt := range []struct {
		policy Policy
		err    string
	}{
		{Policy{}, on + `/@limit (line 2): "0ms" is too short` + limits},
		{policy(func(p *Policy) { p.Migrate.Limit = 0 }), on + `/@limit (line 2): "0ms" is too short` + limits},
		{policy(func(p *Policy) { p.Checkpoint.Limit = MaxLimit + 1 }), on + `/@limit (line 2): "900000.000001ms" is too long` + limits},
		{policy(func(p *Policy) { p.Checkpoint.Limit = math.MinInt64 }), on + `/@limit (line 2): "-2562047h47m16.854775808s" is negative` + limits},
		{policy(func(p *Policy) { p.Suspend.Limit = time.Second }),
			on + `/@limit (line 2): a limit, but suspend is held however long it is; allowed: no limit, or do="catch-up"`},
		{policy(func(p *Policy) { p.Suspend.Do = 7 }), on + `/@do (line 2): unknown value "action 7"; allowed: catch-up, hold`},
		{policy(func(p *Policy) { p.Reference = 7 }), clock + `/@reference (line 1): unknown value "reference 7"; allowed: raw, utc`},
		{policy(func(p *Policy) { p.Monitor = 7 }), clock + `/@monitor (line 1): unknown value "monitor 7"; allowed: relayed, direct`},
		{policy(func(p *Policy) { p.Slew = MaxSlew + 1 }), clock + `/@slew (line 1): "100001ppm" is too fast; ` + slews},
	} {
		_, err := Enable([]byte("<domain><name>a</name></domain>"), EditOptions{Policy: tt.policy})
		checkError(t, err, tt.err)
	}
}

func TestLimit(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1ms": time.Millisecond, "900000ms": MaxLimit, "0.001s": time.Millisecond, "900.000000s": MaxLimit,
		"15m": MaxLimit, "15min": MaxLimit, "0.000017m": 1020 * time.Microsecond, "1.000001ms": time.Millisecond + 1,
		"0.5min": 30 * time.Second, "1.0s": time.Second,
	} {
		if d, reason := parseLimit(s); d != want || reason != "" {
			t.Errorf("%s: got %v %s, want %v", s, d, reason, want)
		}
	}
	for d, want := range map[time.Duration]string{
		time.Millisecond: "1ms", time.Second: "1s", time.Minute: "60s", 90 * time.Second: "90s", 2 * time.Minute: "2m",
		MaxLimit: "15m", time.Millisecond + 1: "1.000001ms", time.Second + time.Microsecond: "1.000001s",
		time.Second + 1: "1000.000001ms", 10 * time.Second: "10s",
	} {
		if got := formatLimit(d); got != want {
			t.Errorf("%v: got %s, want %s", d, got, want)
		}
	}
}
