package main

import (
	"strings"
	"testing"

	"ftclock/control"
	"ftclock/xml-templates"
)

const someUUID = "11111111-1111-4111-8111-111111111111"

// A shim that is there is given the policy, and none is started.
func TestServeWithShim(t *testing.T) {
	before := shims
	defer func() { shims = before }()
	shims = t.TempDir()
	f, err := startFakeShim(shims, control.Status{Name: "web", UUID: someUUID, Version: "fake", Mode: control.Relay, State: control.Correcting})
	if err != nil {
		t.Fatal(err)
	}
	defer f.stop()
	l := &live{domain: &domain{name: "web", uuid: someUUID}, pid: -1}
	var out strings.Builder
	p := &program{ui: &ui{stdout: &out}, ctx: t.Context()}
	policy := metadata.Default()
	policy.Reference = metadata.UTC
	if err := l.serve(p, policy); err != nil {
		t.Fatal(err)
	}
	if got := f.asked[len(f.asked)-1]; got.Do != "policy" || got.Clock != policy.XML() {
		t.Errorf("asked %+v", got)
	}
	if err := l.report(p); err != nil || strings.Contains(out.String(), "is relayed until it stops") {
		t.Errorf("%v, %s", err, out.String())
	}
	policy.Monitor = metadata.Direct
	f.status.Clock = policy.XML()
	if err := l.report(p); err != nil || !strings.Contains(out.String(), "web: its monitor is relayed until it stops\n") {
		t.Errorf("%v, %s", err, out.String())
	}
	const missed = "web: is paused, and this pause isn't caught up"
	l.paused = true
	if err := l.report(p); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), missed) {
		t.Errorf("the module was there when the pause began: %s", out.String())
	}
	l.fresh = true
	if err := l.report(p); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), missed) {
		t.Errorf("nothing about the pause: %s", out.String())
	}

	// Leaving the clock alone: a relay stays.
	said, err := l.leave(p)
	if err != nil || !strings.Contains(said, "relays the monitor until the domain stops") {
		t.Errorf("%q, %v", said, err)
	}
	if got := f.asked[len(f.asked)-1]; got.Do != "policy" || got.Clock != "" {
		t.Errorf("asked %+v", got)
	}
	// A watch goes. This fake can't.
	f.status.Mode = control.Watch
	if _, err := l.leave(p); err == nil || !strings.Contains(err.Error(), "fake doesn't know quit") {
		t.Errorf("%v", err)
	}
}
