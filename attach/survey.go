package attach

import (
	"bufio"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ftclock/host"
)

// subject is a process that was looked at and can be attached to: everything that is needed once it is stopped.
type subject struct {
	pid     int
	start   uint64 // when it was started, in clock ticks since boot
	exe     string // as /proc/PID/exe links
	library string // the path for dlopen, as the process sees it
	local   string // the same file, as we see it; "" where image goes into a memory file of the process's
	image   []byte // what the library's file holds, for such a memory file
	mem     *os.File

	entry     uint64 // address of _start
	code      [stubRoom]byte
	functions map[string]uint64 // addresses of functions of the C library
	stackLow  uint64            // of the main thread
	stackHigh uint64
}

func (s *subject) close() { s.mem.Close() }

// survey finds out whether pid can be attached to, to load the library at a path that it sees, and all that is needed for
// it. It doesn't touch the process. suits refuses programs that are not for us; the tests have programs of their own.
func survey(pid int, library string, suits func(*subject) error) (*subject, error) {
	s := &subject{pid: pid, library: library}
	return s, s.survey(suits, dlFunctions, func(state status) (err error) {
		s.local, err = resolve(pid, library, state)
		return err
	})
}

// surveySealed is survey for a library at a path that we see. The process is given what is in the file.
func surveySealed(pid int, library string, suits func(*subject) error) (*subject, error) {
	s := &subject{pid: pid, library: memoryName + strings.Repeat("\x00", memoryRoom)}
	return s, s.survey(suits, slices.Concat(dlFunctions, memoryFunctions), func(status) (err error) {
		if err := seesProc(pid); err != nil {
			return err
		}
		s.image, err = readLibrary(library)
		return err
	})
}

// survey does what both have in common. find finds the library. Without an error s.close is due.
func (s *subject) survey(suits func(*subject) error, functions []string, find func(status) error) error {
	pid := s.pid
	stat, err := readStat(pid)
	if err != nil {
		return err
	}
	s.start = stat.Started
	state, err := readStatus(pid)
	if err != nil {
		return err
	}
	if state.state == 'Z' {
		return state.serves()
	}
	if err := s.lookAtProgram(suits, functions); err != nil {
		return err
	}
	if err := state.serves(); err != nil {
		return err
	}
	if err := find(state); err != nil {
		return err
	}
	// The descriptor goes with the address space of now. Should the process call execve, it leads nowhere.
	if s.mem, err = os.OpenFile(procPath(pid, "mem"), os.O_RDWR, 0); err != nil {
		return procError(err)
	}
	if err := s.lookAtMemory(); err != nil {
		s.close()
		return err
	}
	return nil
}

// isQEMU refuses what is not a QEMU with a KVM virtual machine.
func (s *subject) isQEMU() error {
	if _, is := qemuProgram(s.exe); !is {
		return fmt.Errorf("%w: the program is %s", ErrNotQEMU, host.OneLine(s.exe))
	}
	return hasVM(s.pid)
}

// lookAtProgram reads the program's file, and finds where _start lies in it.
func (s *subject) lookAtProgram(suits func(*subject) error, functions []string) (err error) {
	if s.exe, err = os.Readlink(procPath(s.pid, "exe")); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			if _, stat := os.Stat(procPath(s.pid, "status")); stat == nil {
				return fmt.Errorf("%w: it has no program (a thread of the kernel?)", ErrNotQEMU)
			}
		}
		return procError(err)
	}
	if err := suits(s); err != nil {
		return err
	}
	program, err := os.Open(procPath(s.pid, "exe"))
	if err != nil {
		return procError(err)
	}
	defer program.Close()
	if err := checkProgram(program); err != nil {
		return err
	}
	offset, err := entryPoint(program, &s.code)
	if err != nil {
		return err
	}
	maps, err := readMaps(s.pid)
	if err != nil {
		return err
	}
	for _, m := range maps {
		switch m.path {
		case s.exe:
			if at, ok := codeAt(maps, m, offset); ok {
				s.entry = at
			}
		case "[stack]":
			s.stackLow, s.stackHigh = m.start, m.end
		}
	}
	if s.entry == 0 {
		return fmt.Errorf("%w: the entry point of %s isn't mapped", ErrNoSlot, host.OneLine(s.exe))
	}
	s.functions, err = findFunctions(s.pid, maps, functions)
	return err
}

// lookAtMemory checks that what is in the process's memory is what its files say.
func (s *subject) lookAtMemory() error {
	var found [stubRoom]byte
	if _, err := s.mem.ReadAt(found[:], int64(s.entry)); err != nil {
		return memoryError("reading the start code", err)
	}
	return s.checkStart(found)
}

// memoryError knows an end of file in /proc/PID/mem: the address space has no user any more, after exit or execve.
func memoryError(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: its memory went while %s", ErrGone, what)
	}
	return fmt.Errorf("%s: %w", what, errno(err))
}

// checkStart allows _start its own bytes, and what a tracer that died has left of the stub, in steps of a word, the
// unit of PTRACE_POKETEXT.
func (s *subject) checkStart(found [stubRoom]byte) error {
	ours := s.stub()
	for at := 0; at < stubRoom; at += wordSize {
		word := string(found[at : at+wordSize])
		if word != string(s.code[at:at+wordSize]) && word != string(ours[at:at+wordSize]) {
			return fmt.Errorf("%w: the start code in memory (% x) is not that of the program's file (% x)",
				ErrNoSlot, found, s.code)
		}
	}
	return nil
}

// stub is the start of _start with our twelve bytes in it.
func (s *subject) stub() [stubRoom]byte {
	code := s.code
	copy(code[:], stub)
	return code
}

// warm reads the library, so that dlopen finds it in the page cache, and the thread isn't held while a disk is slow.
func (s *subject) warm() error {
	if s.local == "" {
		return nil
	}
	_, err := readLibrary(s.local)
	if err != nil {
		return fmt.Errorf("%s: %w", s.library, err)
	}
	return nil
}

// readLibrary reads a library's file.
func readLibrary(path string) ([]byte, error) {
	const limit = 64 << 20
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the library %s: %w", path, errno(err))
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("reading the library %s: %w", path, errno(err))
	}
	if len(content) == limit {
		return nil, fmt.Errorf("the library %s is larger than %d MB", path, limit>>20)
	}
	return content, nil
}

// checkProgram says whether the module could take this program's ioctl slot.
func checkProgram(r io.ReaderAt) error {
	f, err := readELF(r)
	if err != nil {
		return err
	}
	if f.Machine != uint16(elf.EM_X86_64) || (f.Type != uint16(elf.ET_DYN) && f.Type != uint16(elf.ET_EXEC)) {
		return fmt.Errorf("%w: the program is no x86-64 executable (%v, %v)", ErrNotQEMU, elf.Machine(f.Machine), elf.Type(f.Type))
	}
	if f.segment(elf.PT_INTERP) == nil || f.segment(elf.PT_DYNAMIC) == nil {
		return fmt.Errorf("%w: the program is statically linked", ErrNoSlot)
	}
	if err := checkLinker(f); err != nil {
		return err
	}
	if !boundAtStart(f) {
		return fmt.Errorf("%w: the program is bound lazily (it lacks BIND_NOW, link with -z now)", ErrNoSlot)
	}
	found, err := relocates(f, "ioctl")
	if err != nil {
		return fmt.Errorf("reading the program's relocations: %w", err)
	}
	if !found {
		return fmt.Errorf("%w: the program has no relocation for ioctl", ErrNoSlot)
	}
	return nil
}

// checkLinker refuses programs for another C library than glibc, which the module is linked against.
func checkLinker(f *elfFile) error {
	segment := f.segment(elf.PT_INTERP)
	linker, err := f.bytes(segment.Off, min(segment.Filesz, unix.PathMax))
	if err != nil {
		return fmt.Errorf("%w: reading the name of its dynamic linker: %w", ErrNoSlot, err)
	}
	name := strings.TrimRight(string(linker), "\x00")
	if strings.HasPrefix(path.Base(name), "ld-musl-") {
		return fmt.Errorf("%w: the program is built for the C library musl (its dynamic linker is %s), and the module needs glibc",
			ErrNoSlot, host.OneLine(name))
	}
	return nil
}

func boundAtStart(f *elfFile) bool {
	segment := f.segment(elf.PT_DYNAMIC)
	entries := make([]elf.Dyn64, min(segment.Filesz, 64<<10)/16)
	if f.read(segment.Off, entries) != nil {
		return false
	}
	for _, entry := range entries {
		switch elf.DynTag(entry.Tag) {
		case elf.DT_NULL:
			return false
		case elf.DT_BIND_NOW:
			return true
		case elf.DT_FLAGS:
			if entry.Val&uint64(elf.DF_BIND_NOW) != 0 {
				return true
			}
		case elf.DT_FLAGS_1:
			if entry.Val&uint64(elf.DF_1_NOW) != 0 {
				return true
			}
		}
	}
	return false
}

// relocates says whether the dynamic linker fills in a slot with the address of the function name.
func relocates(f *elfFile, name string) (bool, error) {
	symbols, err := f.symbols(name)
	if err != nil {
		return false, err
	}
	room := uint64(maxTable) // all of them may lie at one place, and be 65,535
	for _, section := range f.sections {
		if section.Type != uint32(elf.SHT_RELA) || section.Flags&uint64(elf.SHF_ALLOC) == 0 {
			continue
		}
		if section.Size > room {
			return false, fmt.Errorf("bad ELF file: it has more than %d MiB of relocations", maxTable>>20)
		}
		room -= section.Size
		const size = 24 // Elf64_Rela: offset, info, addend
		content := bufio.NewReaderSize(io.NewSectionReader(f.r, int64(section.Off), int64(section.Size)), 64<<10)
		for entry := make([]byte, size); ; {
			if _, err := io.ReadFull(content, entry); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return false, err
			}
			info := binary.LittleEndian.Uint64(entry[8:])
			kind := elf.R_X86_64(info & 0xffffffff)
			if (kind == elf.R_X86_64_JMP_SLOT || kind == elf.R_X86_64_GLOB_DAT) &&
				slices.ContainsFunc(symbols, func(s symbol) bool { return s.index == info>>32 }) {
				return true, nil
			}
		}
	}
	return false, nil
}

// How glibc's _start begins on x86-64 (sysdeps/x86_64/start.S): it clears the frame pointer, saves the function to run
// at exit, and takes argc from the stack. What comes back from main comes back 27 bytes or more behind.
const startCode = "\x31\xed\x49\x89\xd1\x5e"

// entryPoint reads the start of _start, and returns its offset in the file.
func entryPoint(r io.ReaderAt, code *[stubRoom]byte) (offset uint64, err error) {
	f, err := readELF(r)
	if err != nil {
		return 0, err
	}
	offset, ok := f.offset(f.Entry, stubRoom)
	if !ok {
		return 0, fmt.Errorf("%w: the program's entry point is not in its file", ErrNoSlot)
	}
	if _, err := r.ReadAt(code[:], int64(offset)); err != nil {
		return 0, err
	}
	const endbr64 = "\xf3\x0f\x1e\xfa"
	if !strings.HasPrefix(strings.TrimPrefix(string(code[:]), endbr64), startCode) {
		return 0, fmt.Errorf("%w: the program doesn't begin like one for glibc (% x)", ErrNoSlot, *code)
	}
	return offset, nil
}

// dlFunctions are what is called of the C library to load a library.
var dlFunctions = []string{"dlopen", "dlerror"}

// findFunctions returns where the process has functions of the C library: in libc, or some in libdl before glibc 2.34.
func findFunctions(pid int, maps []mapping, names []string) (map[string]uint64, error) {
	seen, found := map[string]bool{}, map[string]uint64{}
	for _, m := range maps {
		name := path.Base(strings.TrimSuffix(m.path, " (deleted)"))
		if !isLibc(name) || seen[m.path] {
			continue
		}
		seen[m.path] = true
		offsets, err := functions(pid, m, names...)
		if err != nil {
			return nil, fmt.Errorf("reading %s of process %d: %w", host.OneLine(m.path), pid, err)
		}
		for name, offset := range offsets {
			if at, ok := codeAt(maps, m, offset); ok && found[name] == 0 {
				found[name] = at
			}
		}
	}
	for _, name := range names {
		if found[name] == 0 {
			return nil, fmt.Errorf("%w: the program has no %s of glibc in memory", ErrNoSlot, name)
		}
	}
	return found, nil
}

// isLibc knows the names by themselves, and those with the version that glibc before 2.34 gave its files.
func isLibc(name string) bool {
	return name == "libc.so.6" || name == "libdl.so.2" ||
		(strings.HasSuffix(name, ".so") && (strings.HasPrefix(name, "libc-2.") || strings.HasPrefix(name, "libdl-2.")))
}

// functions returns the file offsets of those functions that the mapped library defines.
func functions(pid int, m mapping, names ...string) (map[string]uint64, error) {
	library, err := openMapped(pid, m)
	if err != nil {
		return nil, err
	}
	defer library.Close()
	f, err := readELF(library)
	if err != nil {
		return nil, err
	}
	symbols, err := f.symbols(names...)
	if err != nil {
		return nil, err
	}
	offsets := map[string]uint64{}
	for _, s := range symbols {
		// A hidden version is there for programs linked long ago: name@VERSION, not name@@VERSION.
		if s.section == elf.SHN_UNDEF || s.kind != elf.STT_FUNC || s.hidden {
			continue
		}
		if offset, ok := f.offset(s.value, 1); ok {
			offsets[s.name] = offset
		}
	}
	return offsets, nil
}
