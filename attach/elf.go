package attach

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
)

// What is read of a program or a library at most, and of its tables in all. QEMU has some 10 MiB, and tables of 2 MiB.
const maxELF, maxTables = 512 << 20, 64 << 20

// readELF guards a use of debug/elf, which isn't hardened against hostile files (its package comment): against panics, and against
// memory without bound. A process may map what it likes under the name of its C library, a memory file will do.
func readELF(r io.ReaderAt, use func(*elf.File) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("bad ELF file: %v", p)
		}
	}()
	// A file may be of any size, and hold nothing.
	f, err := elf.NewFile(unnamed{io.NewSectionReader(r, 0, maxELF)})
	if err != nil {
		return err
	}
	tables := uint64(0)
	for i, s := range f.Sections {
		if s.Type == elf.SHT_NOBITS || s.Type == elf.SHT_PROGBITS {
			continue
		}
		if s.Flags&elf.SHF_COMPRESSED != 0 {
			return fmt.Errorf("bad ELF file: section %d is compressed", i)
		}
		if tables += min(s.Size, maxELF); tables > maxTables {
			return fmt.Errorf("bad ELF file: its tables have more than %d MB", maxTables>>20)
		}
	}
	return use(f)
}

// unnamed is an ELF file whose sections have no names, which nobody here needs. The table of the names is read before anything of
// it can be checked, and it may be compressed; and by its name any section may be.
type unnamed struct{ io.ReaderAt }

func (u unnamed) ReadAt(b []byte, off int64) (n int, err error) {
	n, err = u.ReaderAt.ReadAt(b, off)
	if off >= 64 { // behind the header
		return n, err
	}
	var head [64]byte
	if _, err := u.ReaderAt.ReadAt(head[:], 0); err != nil {
		return 0, err
	}
	sections, count, names := int64(40), int64(60), int64(62) // e_shoff, e_shnum, e_shstrndx of Elf64_Ehdr
	if elf.Class(head[elf.EI_CLASS]) == elf.ELFCLASS32 {
		sections, count, names = 32, 48, 50
	}
	// The number may also be in the first section. No program has so many.
	if !bytes.Equal(head[sections:sections+4], make([]byte, 4)) && head[count]|head[count+1] == 0 {
		return 0, errors.New("bad ELF file: it has more than 65,279 sections")
	}
	for at := names; at < names+2; at++ {
		if i := at - off; i >= 0 && i < int64(n) {
			b[i] = 0
		}
	}
	return n, err
}

// dynamicSymbols gives each of the dynamic symbols that have one of these names: its index, and whether its version is hidden. Names
// are compared where they are: debug/elf would make a string of each, and in a hostile file all of them may end at the same far place.
func dynamicSymbols(f *elf.File, names []string, each func(index uint64, name string, s elf.Sym64, hidden bool)) error {
	table := f.SectionByType(elf.SHT_DYNSYM)
	if table == nil {
		return elf.ErrNoSymbols
	}
	if table.Link == 0 || int(table.Link) >= len(f.Sections) || f.Sections[table.Link].Type != elf.SHT_STRTAB {
		return errors.New("bad ELF file: its symbols have no names")
	}
	symbols, err := table.Data()
	if err != nil {
		return err
	}
	text, err := f.Sections[table.Link].Data()
	if err != nil {
		return err
	}
	var versions []byte
	if s := f.SectionByType(elf.SHT_GNU_VERSYM); s != nil {
		if versions, err = s.Data(); err != nil {
			return err
		}
	}
	for i := 0; len(symbols) >= (i+1)*elf.Sym64Size; i++ {
		b := symbols[i*elf.Sym64Size:]
		s := elf.Sym64{Name: f.ByteOrder.Uint32(b), Info: b[4], Other: b[5], Shndx: f.ByteOrder.Uint16(b[6:]),
			Value: f.ByteOrder.Uint64(b[8:]), Size: f.ByteOrder.Uint64(b[16:])}
		rest := text[min(uint64(s.Name), uint64(len(text))):]
		for _, name := range names {
			if len(rest) > len(name) && rest[len(name)] == 0 && string(rest[:len(name)]) == name {
				hidden := len(versions) >= 2*(i+1) && elf.VersionIndex(f.ByteOrder.Uint16(versions[2*i:])).IsHidden()
				each(uint64(i), name, s, hidden)
			}
		}
	}
	return nil
}
