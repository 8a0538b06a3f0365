package clockpage

import (
	"encoding/json"
	"testing"
)

// A record goes through JSON in words, and comes back as it was, with a value that this version doesn't know, too.
func TestRecordInWords(t *testing.T) {
	r := Record{Number: 7, Lost: -5, Outcome: Outcome{Decision: Held, Reason: OverLimit, Event: Suspend}, Ordered: 1, TSC: TSCUnmoved}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"flags":0,"number":7,"saved_ns":0,"went_on_ns":0,"stop_raw_ns":0,"cont_raw_ns":0,"stop_real_ns":0,"cont_real_ns":0,"lost_ns":-5,` +
		`"residual_stop_ns":0,"residual_cont_ns":0,"order_lost_ns":0,"cost_ns":0,"decision":"held","reason":"longer than its limit",` +
		`"event":"suspend","ordered":true,"tsc":"not moved","error_ns":0,"slept_ns":0}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	for _, r := range []Record{r, {}, {Outcome: Outcome{Decision: 4711, Reason: 65535, Event: 99}, TSC: 200}} {
		var back Record
		if text, err = json.Marshal(r); err == nil {
			err = json.Unmarshal(text, &back)
		}
		if err != nil || back != r {
			t.Errorf("%s came back as %+v: %v", text, back, err)
		}
	}
	var later Outcome
	if err := json.Unmarshal([]byte(`{"decision":"of a later version"}`), &later); err != nil || later.Decision.String() != "unknown (65535)" {
		t.Errorf("a later version's decision: %v, %v", later.Decision, err)
	}
	if text, err = json.Marshal(Anchor{Valid: 2}); err != nil || !json.Valid(text) || string(text[:15]) != `{"valid":false,` {
		t.Errorf("a flag of 2: %s, %v", text, err)
	}
}

func TestOutcome(t *testing.T) {
	for _, c := range []struct {
		outcome                        Outcome
		caughtUp, inDoubt, uncorrected bool
	}{
		{Outcome{Dropped, InTolerance, Checkpoint}, true, false, false},
		{Outcome{Anchored, OutOfTolerance, Checkpoint}, true, false, false},
		{Outcome{Held, ByThePolicy, Suspend}, false, false, false},
		{Outcome{Held, OverLimit, Suspend}, false, false, true},
		{Outcome{Passed, Torn, Checkpoint}, false, true, true},
		{Outcome{Passed, OtherValue, Restore}, false, true, true},
		{Outcome{Passed, First, NoEvent}, false, false, false},
		{Outcome{Passed, Unstable, Start}, false, false, false},
	} {
		o := c.outcome
		if o.CaughtUp() != c.caughtUp || o.InDoubt() != c.inDoubt || o.Uncorrected() != c.uncorrected {
			t.Errorf("%+v: caught up %t, in doubt %t, uncorrected %t", o, o.CaughtUp(), o.InDoubt(), o.Uncorrected())
		}
	}
}
