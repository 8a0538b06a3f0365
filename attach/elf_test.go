package attach

import (
	"bytes"
	"compress/zlib"
	"debug/elf"
	"encoding/binary"
	"os"
	"runtime"
	"slices"
	"testing"

	"ftclock/test/check"
)

// hostileELF is a program's file, changed.
type hostileELF struct{ content []byte }

// section gives the header of a section, by its number.
func (h *hostileELF) section(i int) []byte {
	at := binary.LittleEndian.Uint64(h.content[40:]) + uint64(i)*64
	return h.content[at : at+64]
}

// kind gives the number of the first section of a kind.
func (h *hostileELF) kind(kind elf.SectionType) int {
	for i := 0; ; i++ {
		if elf.SectionType(binary.LittleEndian.Uint32(h.section(i)[4:])) == kind {
			return i
		}
	}
}

// hold has a section hold other bytes.
func (h *hostileELF) hold(i int, content []byte) {
	binary.LittleEndian.PutUint64(h.section(i)[24:], uint64(len(h.content)))
	binary.LittleEndian.PutUint64(h.section(i)[32:], uint64(len(content)))
	h.content = append(h.content, content...)
}

// compress has a section hold a few bytes that are many.
func (h *hostileELF) compress(i int) {
	const many = 256 << 20
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, elf.Chdr64{Type: uint32(elf.COMPRESS_ZLIB), Size: many})
	z := zlib.NewWriter(&b)
	part := make([]byte, 1<<20)
	for range many / len(part) {
		_, _ = z.Write(part)
	}
	_ = z.Close()
	h.hold(i, b.Bytes())
	flags := binary.LittleEndian.Uint64(h.section(i)[8:])
	binary.LittleEndian.PutUint64(h.section(i)[8:], flags&^uint64(elf.SHF_ALLOC)|uint64(elf.SHF_COMPRESSED))
}

// Whatever a process maps as its C library or program, reading it takes no memory without bound.
func TestHostileELF(t *testing.T) {
	program := check.Value(os.ReadFile("/bin/true"))(t)
	const bound = 100 << 20
	for name, change := range map[string]func(*hostileELF){
		"as it is": func(*hostileELF) {},
		"compressed names of its sections": func(h *hostileELF) {
			h.compress(int(binary.LittleEndian.Uint16(h.content[62:])))
		},
		"compressed symbols": func(h *hostileELF) { h.compress(h.kind(elf.SHT_DYNSYM)) },
		"compressed names of its symbols": func(h *hostileELF) {
			h.compress(int(binary.LittleEndian.Uint32(h.section(h.kind(elf.SHT_DYNSYM))[40:])))
		},
		"names of its symbols that are no table": func(h *hostileELF) {
			code := h.kind(elf.SHT_PROGBITS)
			h.compress(code)
			binary.LittleEndian.PutUint32(h.section(h.kind(elf.SHT_DYNSYM))[40:], uint32(code))
		},
		"symbols with one long name": func(h *hostileELF) {
			symbols := h.kind(elf.SHT_DYNSYM)
			names := int(binary.LittleEndian.Uint32(h.section(symbols)[40:]))
			h.hold(symbols, make([]byte, 1000*elf.Sym64Size))
			h.hold(names, append(bytes.Repeat([]byte("x"), 1<<20), 0))
		},
		"many tables": func(h *hostileELF) {
			content := h.content
			header := slices.Clone(h.section(h.kind(elf.SHT_RELA)))
			binary.LittleEndian.PutUint64(header[24:], 0)
			binary.LittleEndian.PutUint64(header[32:], maxTable/2)
			all := slices.Clone(h.content[binary.LittleEndian.Uint64(content[40:]):][:64*int(binary.LittleEndian.Uint16(content[60:]))])
			for range 100 {
				all = append(all, header...)
			}
			h.content = append(append(content, make([]byte, maxTable/2)...), all...)
			binary.LittleEndian.PutUint64(h.content[40:], uint64(len(h.content)-len(all)))
			binary.LittleEndian.PutUint16(h.content[60:], uint16(len(all)/64))
		},
		"more sections than its header can say": func(h *hostileELF) {
			const sections = 500_000
			all := make([]byte, 64*sections)
			binary.LittleEndian.PutUint64(all[32:], sections)
			binary.LittleEndian.PutUint64(h.content[40:], uint64(len(h.content)))
			binary.LittleEndian.PutUint16(h.content[60:], 0)
			h.content = append(h.content, all...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := &hostileELF{slices.Clone(program)}
			change(h)
			r := bytes.NewReader(h.content)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			f, err := readELF(r)
			if err == nil {
				_, err = relocates(f, "ioctl")
			}
			runtime.ReadMemStats(&after)
			if took := after.TotalAlloc - before.TotalAlloc; took > bound {
				t.Errorf("it took %d MB: %v", took>>20, err)
			}
			t.Logf("%d MB: %v", (after.TotalAlloc-before.TotalAlloc)>>20, err)
		})
	}
}
