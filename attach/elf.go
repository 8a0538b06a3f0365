package attach

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// What is read of a program or a library at most, and of one of its tables. QEMU has some 10 MiB, and tables of 3 MiB.
const maxELF, maxTable = 512 << 20, 24 << 20

// An elfFile is a 64-bit ELF file of a program or a library: what a hostile process maps may be of any size, and hold anything.
// debug/elf has the format. Its File, which makes a value of each of QEMU's 20,000 symbols and can unpack debugging information, took
// more of a shim's memory than all else together.
type elfFile struct {
	r io.ReaderAt
	elf.Header64
	progs    []elf.Prog64
	sections []elf.Section64
}

func readELF(r io.ReaderAt) (*elfFile, error) {
	f := &elfFile{r: io.NewSectionReader(r, 0, maxELF)}
	if err := f.read(0, &f.Header64); err != nil {
		return nil, fmt.Errorf("bad ELF file: %w", err)
	}
	if !bytes.HasPrefix(f.Ident[:], []byte(elf.ELFMAG)) {
		return nil, fmt.Errorf("bad ELF file: it begins with % x", f.Ident[:len(elf.ELFMAG)])
	}
	if class, data := elf.Class(f.Ident[elf.EI_CLASS]), elf.Data(f.Ident[elf.EI_DATA]); class != elf.ELFCLASS64 || data != elf.ELFDATA2LSB {
		return nil, fmt.Errorf("%w: the program is no x86-64 executable (%v, %v)", ErrNotQEMU, class, data)
	}
	f.progs, f.sections = make([]elf.Prog64, f.Phnum), make([]elf.Section64, f.Shnum)
	if int(f.Phentsize) != binary.Size(elf.Prog64{}) || f.Shnum > 0 && int(f.Shentsize) != binary.Size(elf.Section64{}) {
		return nil, fmt.Errorf("bad ELF file: its headers have %d and %d bytes", f.Phentsize, f.Shentsize)
	}
	if err := f.read(f.Phoff, f.progs); err != nil {
		return nil, fmt.Errorf("bad ELF file: reading its segments: %w", err)
	}
	if err := f.read(f.Shoff, f.sections); err != nil {
		return nil, fmt.Errorf("bad ELF file: reading its sections: %w", err)
	}
	return f, nil
}

// read reads values of a fixed size.
func (f *elfFile) read(offset uint64, values any) error {
	b, err := f.bytes(offset, uint64(binary.Size(values)))
	if err != nil {
		return err
	}
	_, err = binary.Decode(b, binary.LittleEndian, values)
	return err
}

func (f *elfFile) bytes(offset, size uint64) ([]byte, error) {
	if offset > maxELF || size > maxTable {
		return nil, fmt.Errorf("%d bytes at %d are too many", size, offset)
	}
	b := make([]byte, size)
	_, err := io.ReadFull(io.NewSectionReader(f.r, int64(offset), int64(size)), b)
	return b, err
}

// segment is the first one of its kind; nil without one.
func (f *elfFile) segment(kind elf.ProgType) *elf.Prog64 {
	for i := range f.progs {
		if f.progs[i].Type == uint32(kind) {
			return &f.progs[i]
		}
	}
	return nil
}

// offset returns where in the file the bytes for a virtual address lie, if size of them do.
func (f *elfFile) offset(address, size uint64) (uint64, bool) {
	for _, p := range f.progs {
		if p.Type == uint32(elf.PT_LOAD) && address >= p.Vaddr && address-p.Vaddr < p.Filesz && p.Filesz-(address-p.Vaddr) >= size {
			return p.Off + (address - p.Vaddr), true
		}
	}
	return 0, false
}

// table is what the first section of its kind holds, and the section that goes with it; nothing without one.
func (f *elfFile) table(kind elf.SectionType) (content []byte, link uint32, err error) {
	i := slices.IndexFunc(f.sections, func(s elf.Section64) bool { return s.Type == uint32(kind) })
	if i < 0 {
		return nil, 0, nil
	}
	content, err = f.bytes(f.sections[i].Off, f.sections[i].Size)
	return content, f.sections[i].Link, err
}

// A symbol is a dynamic one.
type symbol struct {
	name    string
	index   uint64
	kind    elf.SymType
	section elf.SectionIndex
	value   uint64
	hidden  bool // its version is
}

// symbols finds the dynamic symbols of these names.
func (f *elfFile) symbols(names ...string) (found []symbol, err error) {
	table, link, err := f.table(elf.SHT_DYNSYM)
	if err != nil {
		return nil, fmt.Errorf("reading the dynamic symbols: %w", err)
	}
	if int64(link) >= int64(len(f.sections)) {
		return nil, fmt.Errorf("bad ELF file: there is no section %d", link)
	}
	texts, err := f.bytes(f.sections[link].Off, f.sections[link].Size)
	if err != nil {
		return nil, fmt.Errorf("reading the symbols' names: %w", err)
	}
	versions, _, err := f.table(elf.SHT_GNU_VERSYM)
	if err != nil {
		return nil, fmt.Errorf("reading the symbols' versions: %w", err)
	}
	le := binary.LittleEndian
	for i := elf.Sym64Size; i+elf.Sym64Size <= len(table); i += elf.Sym64Size { // behind the null symbol
		index, entry := i/elf.Sym64Size, table[i:] // Elf64_Sym: name, info, other, section, value, size
		text := texts[min(int(le.Uint32(entry)), len(texts)):]
		for _, name := range names {
			if len(text) <= len(name) || text[len(name)] != 0 || string(text[:len(name)]) != name {
				continue
			}
			s := symbol{name: name, index: uint64(index), kind: elf.ST_TYPE(entry[4]), section: elf.SectionIndex(le.Uint16(entry[6:])), value: le.Uint64(entry[8:])}
			s.hidden = len(versions) >= 2*index+2 && le.Uint16(versions[2*index:])&0x8000 != 0
			found = append(found, s)
		}
	}
	return found, nil
}
