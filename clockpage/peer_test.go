package clockpage

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain fails if a test left a file or a mapping of a page behind.
func TestMain(m *testing.M) {
	before, err := openPages()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	peer.remove()
	after, err := openPages()
	if err == nil && after != before {
		err = fmt.Errorf("tests leaked pages: %d files and mappings before, %d after", before, after)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// openPages counts this process's memfds of pages, and its mappings of them.
func openPages() (int, error) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, err
	}
	n := strings.Count(string(maps), "/memfd:"+Name)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, err
	}
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && strings.HasPrefix(target, "/memfd:"+Name) {
			n++
		}
	}
	return n, nil
}

// memfd makes a page's file as the module does, but for the size and the seals.
func memfd(t testing.TB, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(Name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), Name)
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

const moduleSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// newPage gives a page with a good head and nothing else in it.
func newPage(t testing.TB) (*Page, *os.File) {
	t.Helper()
	f := memfd(t, Size, moduleSeals)
	writeHead(t, f, goodHead)
	p, err := Map(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p, f
}

// A compiled testdata/peer.c, made once for all tests.
type peerProgram struct {
	dir, path string
	header    header
	err       error
	made      bool
}

var peer peerProgram

func (p *peerProgram) remove() {
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

func (p *peerProgram) build() error {
	src, err := os.ReadFile("clockpage.h")
	if err != nil {
		return err
	}
	if p.header, err = parseHeader(string(src)); err != nil {
		return err
	}
	if p.dir, err = os.MkdirTemp("", "clockpage-peer-"); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(p.dir, "members.inc"), []byte(p.header.members()), 0o600); err != nil {
		return err
	}
	p.path = filepath.Join(p.dir, "peer")
	// The go command runs a test again if a file changed that the test looked at: gcc's don't count.
	for _, f := range []string{"testdata/peer.c", "../qemu-plugin/rule_page.h", "../qemu-plugin/rule.h"} {
		if _, err := os.Stat(f); err != nil {
			return err
		}
	}
	out, err := exec.Command("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-I"+p.dir,
		"-I../qemu-plugin", "-o", p.path, "testdata/peer.c").CombinedOutput()
	if err != nil {
		return fmt.Errorf("compiling testdata/peer.c: %w\n%s", err, out)
	}
	return nil
}

// startPeer gives the command that runs the peer on f.
func startPeer(t *testing.T, f *os.File, args ...string) *exec.Cmd {
	t.Helper()
	if !peer.made {
		peer.made = true
		peer.err = peer.build()
	}
	if peer.err != nil {
		t.Fatal(peer.err)
	}
	cmd := exec.Command(peer.path, args...)
	cmd.Stderr = os.Stderr
	if f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	return cmd
}

// runPeer runs the peer to its end and gives what it printed: lines of words.
func runPeer(t *testing.T, f *os.File, args ...string) [][]string {
	t.Helper()
	out, err := startPeer(t, f, args...).Output()
	if err != nil {
		t.Fatalf("peer %v: %v", args, err)
	}
	var lines [][]string
	for line := range strings.Lines(string(out)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines
}

// What clockpage.h declares, in its order.
type header struct {
	sections []section
	enums    map[string][]string // enumerators by the enumeration's name without prefix
	defines  []string            // names of constants that are numbers
}

type section struct {
	name    string // without prefix
	members []string
}

var (
	comments    = regexp.MustCompile(`(?s)/\*.*?\*/`)
	structs     = regexp.MustCompile(`(?s)struct ftclock_(\w+) \{(.*?)\n\};`)
	enums       = regexp.MustCompile(`(?s)enum ftclock_(\w+) \{(.*?)\n\};`)
	enumerators = regexp.MustCompile(`(FTCLOCK_\w+) = (\d+),`)
	members     = regexp.MustCompile(`(?:u?int(?:8|16|32|64)_t) (\w+)(?:\[\d+\])?;`)
	defines     = regexp.MustCompile(`(?m)^#define (FTCLOCK_\w+) +(?:U?INT64_C\(|\d)`)
)

func parseHeader(src string) (header, error) {
	src = comments.ReplaceAllString(src, "")
	h := header{enums: map[string][]string{}}
	for _, s := range structs.FindAllStringSubmatch(src, -1) {
		if s[1] == "page" {
			continue // sections, not words
		}
		sec := section{name: s[1]}
		for _, m := range members.FindAllStringSubmatch(s[2], -1) {
			sec.members = append(sec.members, m[1])
		}
		if n := strings.Count(s[2], ";"); n != len(sec.members) {
			return h, fmt.Errorf("struct %s: the test understands %d of %d members", s[1], len(sec.members), n)
		}
		h.sections = append(h.sections, sec)
	}
	for _, e := range enums.FindAllStringSubmatch(src, -1) {
		for _, v := range enumerators.FindAllStringSubmatch(e[2], -1) {
			h.enums[e[1]] = append(h.enums[e[1]], v[1])
		}
		if n := strings.Count(e[2], ","); n != len(h.enums[e[1]]) {
			return h, fmt.Errorf("enum %s: the test understands %d of %d enumerators", e[1], len(h.enums[e[1]]), n)
		}
	}
	for _, d := range defines.FindAllStringSubmatch(src, -1) {
		h.defines = append(h.defines, d[1])
	}
	if len(h.sections) != 11 || len(h.enums) != 7 || len(h.defines) < 8 {
		return h, fmt.Errorf("clockpage.h: found %d sections, %d enumerations, %d constants", len(h.sections), len(h.enums),
			len(h.defines))
	}
	return h, nil
}

// members gives members.inc (see testdata/peer.c).
func (h header) members() string {
	var b strings.Builder
	for _, s := range h.sections {
		fmt.Fprintf(&b, "SECTION(%s)\n", s.name)
		for _, m := range s.members {
			if !strings.HasPrefix(m, "reserved") {
				fmt.Fprintf(&b, "MEMBER(%s, %s)\n", s.name, m)
			}
		}
	}
	for _, d := range h.defines {
		fmt.Fprintf(&b, "VALUE(%s)\n", d)
	}
	for _, vs := range h.enums {
		for _, v := range vs {
			fmt.Fprintf(&b, "VALUE(%s)\n", v)
		}
	}
	return b.String()
}
