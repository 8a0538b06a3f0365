package shim

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"testing"

	"ftclock/clockpage"

	"github.com/rs/zerolog"
)

// What libvirt and QEMU said to each other in a recording, as one stream.
func BenchmarkRecogniser(b *testing.B) {
	text, err := os.ReadFile("testdata/" + recordings[0])
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		var r recogniser
		for rest := text; len(rest) > 0; {
			n, _, _ := r.feed(rest)
			rest = rest[n:]
		}
	}
}

// A command as libvirt sends it, and how its answer comes back, each way through the relay once.
func BenchmarkRelay(b *testing.B) {
	for _, c := range []struct{ name, command string }{
		{"query-status", `{"execute":"query-status","id":"libvirt-400"}` + "\r\n"},
		{"cont", `{"execute":"cont","id":"libvirt-401"}` + "\r\n"},
	} {
		b.Run(c.name, func(b *testing.B) {
			client, qemu, wait := between(b, quiet{})
			command, answer := []byte(c.command), []byte(`{"return": {}, "id": "libvirt-401"}`+"\r\n")
			buf := make([]byte, 4096)
			trip := func(from, to io.ReadWriter, text []byte) {
				if _, err := from.Write(text); err != nil {
					b.Fatal(err)
				}
				for got := 0; got < len(text); {
					n, err := to.Read(buf)
					if err != nil {
						b.Fatal(err)
					}
					got += n
				}
			}
			for b.Loop() {
				trip(client, qemu, command)
				trip(qemu, client, answer)
			}
			client.Close()
			qemu.Close()
			_ = wait()
		})
	}
}

// The same without a relay: what two sockets and a reader cost.
func BenchmarkSocket(b *testing.B) {
	client, qemu := pair(b)
	text, buf := bytes.Repeat([]byte("x"), 47), make([]byte, 64)
	for b.Loop() {
		for _, ends := range [][2]io.ReadWriter{{client, qemu}, {qemu, client}} {
			if _, err := ends[0].Write(text); err != nil {
				b.Fatal(err)
			}
			if _, err := ends[1].Read(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// quiet is an observer that does nothing.
type quiet struct{}

func (quiet) command(message)     {}
func (quiet) fromQEMU(message)    {}
func (quiet) holds() bool         { return false }
func (quiet) unread(bool)         {}
func (quiet) cont(message) string { return "" }

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
	d, err := newDomain(zerolog.New(io.Discard), memory{Clock: `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`}, func(memory) {})
	if err != nil {
		b.Fatal(err)
	}
	d.resume(page, true)
	d.command(message{execute: "stop"})
	d.fromQEMU(message{event: "STOP"})
	cont := message{execute: "cont", id: `"libvirt-401"`}
	for b.Loop() {
		d.cont(cont)
	}
	if !d.pause.ordered {
		b.Fatal("no order was given")
	}
}
