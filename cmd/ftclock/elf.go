package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"slices"
)

// ioctlSlots counts the slots through which a program calls ioctl, which is where the module goes, and tells whether
// the dynamic linker fills them before the program starts (DF_BIND_NOW, DF_1_NOW: elf(5)).
func ioctlSlots(path string) (slots int, bindNow bool, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		return 0, false, fmt.Errorf("program for %v, not x86-64", f.Machine)
	}
	symbols, err := f.DynamicSymbols()
	if errors.Is(err, elf.ErrNoSymbols) {
		return 0, false, errors.New("linked statically")
	}
	if err != nil {
		return 0, false, fmt.Errorf("reading the symbols: %w", err)
	}
	for _, section := range f.Sections {
		if section.Type != elf.SHT_RELA || section.Flags&elf.SHF_ALLOC == 0 {
			continue
		}
		table, err := section.Data()
		if err != nil {
			return 0, false, fmt.Errorf("reading the relocations: %w", err)
		}
		for ; len(table) >= relaSize; table = table[relaSize:] {
			info := f.ByteOrder.Uint64(table[8:])
			symbol := elf.R_SYM64(info) // 0 is none; debug/elf leaves it out of its list
			kind := elf.R_X86_64(elf.R_TYPE64(info))
			if symbol > 0 && int(symbol) <= len(symbols) && symbols[symbol-1].Name == "ioctl" &&
				(kind == elf.R_X86_64_JMP_SLOT || kind == elf.R_X86_64_GLOB_DAT) {
				slots++
			}
		}
	}
	return slots, bindsNow(f), nil
}

// relaSize is that of an Elf64_Rela.
const relaSize = 24

func bindsNow(f *elf.File) bool {
	has := func(tag elf.DynTag, bit uint64) bool {
		values, err := f.DynValue(tag)
		return err == nil && slices.ContainsFunc(values, func(v uint64) bool { return v&bit != 0 })
	}
	if values, err := f.DynValue(elf.DT_BIND_NOW); err == nil && len(values) > 0 {
		return true
	}
	return has(elf.DT_FLAGS, uint64(elf.DF_BIND_NOW)) || has(elf.DT_FLAGS_1, uint64(elf.DF_1_NOW))
}
