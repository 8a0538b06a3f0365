package shim

import (
	"encoding/binary"
	"testing"

	"ftclock/clockpage"
	"ftclock/relay"
)

// From the cont's arrival until the order is in the page: what a cont is held for.
func BenchmarkOrder(b *testing.B) {
	f, page := newPage(b, clockpage.Minor)
	// The module's: the guest is paused, for the first time. Its section is "now" of clockpage.h.
	now := make([]byte, 16)
	binary.LittleEndian.PutUint32(now, 2)
	binary.LittleEndian.PutUint32(now[4:], 1)
	binary.LittleEndian.PutUint64(now[8:], 1)
	if _, err := f.WriteAt(now, 320); err != nil {
		b.Fatal(err)
	}
	d := testDomain(b, byDefault)
	d.resume(page, true)
	d.Command(relay.Message{Execute: "stop"})
	d.FromQEMU(relay.Message{Event: "STOP"})
	cont := relay.Message{Execute: "cont", ID: `"libvirt-401"`}
	for b.Loop() {
		d.Cont(cont)
	}
	if !d.pause.ordered {
		b.Fatal("no order was given")
	}
}
