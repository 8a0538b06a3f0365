package shim

import (
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	metadata "ftclock/xml-templates"
)

func TestCompare(t *testing.T) {
	const ms = uint64(time.Millisecond)
	seen := pauseSeen{stopSent: 100 * ms, stopEvent: 102 * ms, contCame: 150 * ms, number: 1}
	byQEMU := pauseSeen{stopEvent: 102 * ms, contCame: 150 * ms, number: 1}
	record := func(stop, cont uint64) clockpage.Record {
		return clockpage.Record{StopRaw: stop * ms, ContRaw: cont * ms, Lost: int64(cont-stop) * int64(ms)}
	}
	for name, c := range map[string]struct {
		record clockpage.Record
		seen   pauseSeen
		want   string
	}{
		"in bounds":                                 {record(101, 151), seen, ""},
		"at the bounds":                             {record(100, 160), seen, ""},
		"the cont before it came":                   {record(101, 149), seen, "before"},
		"the cont after its answer":                 {record(101, 161), seen, "after"},
		"longer than from the stop":                 {record(80, 155), seen, "there were only"},
		"shorter than from the STOP event":          {record(110, 151), seen, "there were already"},
		"read again in a pause of QEMU's own":       {record(110, 151), byQEMU, ""},
		"longer, but nobody knows when it began":    {record(50, 151), byQEMU, ""},
		"loaded while the guest was paused already": {clockpage.Record{ContRaw: 1}, seen, ""},
	} {
		got := compare(c.record, c.seen, 160*ms)
		if c.want == "" && got != "" || c.want == "there were only" && !strings.Contains(got, c.want) ||
			c.want == "there were already" && !strings.Contains(got, c.want) || c.want != "" && got == "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestJudge(t *testing.T) {
	p := metadata.Default()
	p.Suspend = metadata.Rule{Do: metadata.CatchUp, Limit: time.Minute}
	for lost, want := range map[time.Duration]clockpage.Event{
		time.Millisecond: clockpage.Checkpoint, p.Checkpoint.Limit: clockpage.Checkpoint,
		p.Checkpoint.Limit + 1: clockpage.Suspend, time.Hour: clockpage.Suspend,
	} {
		if event, do := judge(&p, lost); event != want || do != clockpage.CatchUp {
			t.Errorf("%v: %v, %v", lost, event, do)
		}
	}
	p.Suspend.Do = metadata.Hold
	if _, do := judge(&p, time.Hour); do != clockpage.Hold {
		t.Errorf("a suspend that is to be held: %v", do)
	}
}
