package shim

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"
	"time"
)

// stateOf makes a state as a worker leaves it after saving each of texts.
func stateOf(texts ...string) []byte {
	mem := make([]byte, stateSize)
	binary.LittleEndian.PutUint64(mem[offMagic:], stateMagic)
	binary.LittleEndian.PutUint32(mem[offVersion:], stateVersion)
	for i, text := range texts {
		number := uint64(i + 1)
		slot := mem[offSlots+int(number&1)*slotSize:]
		binary.LittleEndian.PutUint64(slot, number)
		binary.LittleEndian.PutUint32(slot[8:], uint32(len(text)))
		binary.LittleEndian.PutUint32(slot[12:], crc32.ChecksumIEEE([]byte(text)))
		copy(slot[slotHead:], text)
	}
	return mem
}

func TestAStateSurvivesAnySave(t *testing.T) {
	s := &stateFile{mem: make([]byte, stateSize)}
	if _, err := s.load(); !errors.Is(err, errState) {
		t.Fatalf("an empty one: %v", err)
	}
	for i := range 5 {
		want := memory{Since: time.Unix(int64(i), 0).UTC(), Clock: "clock", QEMU: i, Workers: uint64(i)}
		if err := s.save(want); err != nil {
			t.Fatal(err)
		}
		got, err := (&stateFile{mem: s.mem}).load()
		if err != nil || got.QEMU != i || got.Workers != uint64(i) || !got.Since.Equal(want.Since) {
			t.Fatalf("%+v became %+v, %v", want, got, err)
		}
		if i == 0 {
			continue
		}
		// A worker that died while it wrote this one leaves the one before, wherever it was.
		for _, at := range []int{0, 8, 12, slotHead, slotHead + 20} {
			torn := append([]byte(nil), s.mem...)
			torn[offSlots+int(s.number&1)*slotSize+at] ^= 0x55
			if at == 0 {
				binary.LittleEndian.PutUint64(torn[offSlots+int(s.number&1)*slotSize:], 0)
			}
			if got, err := (&stateFile{mem: torn}).load(); err != nil || got.QEMU != i-1 {
				t.Errorf("torn at %d: %+v, %v", at, got, err)
			}
		}
	}
}

// FuzzRelayState loads anything, as both slots and as a whole.
func FuzzRelayState(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte(`{"since":"2026-01-02T03:04:05Z","clock":"<x/>","gate":true,"workers":3,"problems":{"warnings":["w"]}}`))
	f.Add([]byte(`{"workers":-1}`))
	f.Add(stateOf(`{"qemu":1}`, `{"qemu":2}`)[:256])
	f.Fuzz(func(t *testing.T, b []byte) {
		raw := make([]byte, stateSize)
		copy(raw, b)
		text := string(b[:min(len(b), slotSize-slotHead)])
		for _, mem := range [][]byte{raw, stateOf(text), stateOf(text, text), stateOf(`{"qemu":7}`, text)} {
			s := &stateFile{mem: mem}
			m, err := s.load()
			if err != nil {
				if !errors.Is(err, errState) {
					t.Fatal(err)
				}
				continue
			}
			if err := s.save(m); err != nil {
				continue // what JSON escapes may have become too long
			}
			again, err := (&stateFile{mem: mem}).load()
			if err != nil || again.Clock != m.Clock || again.QEMU != m.QEMU || again.Workers != m.Workers {
				t.Fatalf("%+v became %+v, %v", m, again, err)
			}
		}
	})
}
