package relay

import (
	"bytes"
	"io"
	"os"
	"testing"
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
			client, qemu, end := between(b, quiet{})
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
			end()
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

func (quiet) Command(Message)     {}
func (quiet) FromQEMU(Message)    {}
func (quiet) Holds() bool         { return false }
func (quiet) Unread(bool)         {}
func (quiet) Cont(Message) string { return "" }
