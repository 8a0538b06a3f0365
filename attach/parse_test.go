package attach

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseStatus(t *testing.T) {
	s := parseStatus([]byte("Name:\tqemu) x\nState:\tT (stopped)\nTracerPid:\t12\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n" +
		"Groups:\t9 10 \nCapEff:\t0000000000080004\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\n"))
	if s.state != 'T' || s.tracer != 12 || s.uid != 4 || s.gid != 8 || fmt.Sprint(s.groups) != "[9 10]" || s.caps != 0x80004 || !s.shadowStack {
		t.Fatalf("%+v", s)
	}
	for content, want := range map[string]error{
		"State:\tZ (zombie)\n":                            ErrGone,
		"State:\tX (dead)\n":                              ErrGone,
		"State:\tT (stopped)\n":                           ErrBusy,
		"State:\tS\nTracerPid:\t1\n":                      ErrTraced,
		"State:\tS\nx86_Thread_features:\tshstk\n":        ErrShadowStack,
		"State:\tS\nx86_Thread_features:\t\nSigBlk:\t0\n": nil,
	} {
		err := parseStatus([]byte(content)).serves()
		if want == nil && err == nil {
			continue
		}
		says(t, err, want, "")
	}
}

func TestParseMaps(t *testing.T) {
	maps := parseMaps([]byte("55f000-55f001000 r-xp 00001000 fe:00 1234    /usr/bin/a b (deleted)\n" +
		"7ffc0000-7ffd0000 rw-p 00000000 00:00 0    [stack]\n1000-2000 rw-p 00000000 00:00 0 \n" +
		"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]\n2000-1000 r-xp 0 0:0 0 x\nnonsense\n"))
	if len(maps) != 3 || maps[0].path != "/usr/bin/a b (deleted)" || maps[0].inode != 1234 || maps[0].offset != 0x1000 || maps[1].path != "[stack]" {
		t.Fatalf("%+v", maps)
	}
	if at, ok := codeAt(maps, maps[0], 0x1010); !ok || at != 0x55f010 {
		t.Errorf("%#x, %v", at, ok)
	}
	for _, offset := range []uint64{0, 0xfff, 1 << 63} {
		if _, ok := codeAt(maps, maps[0], offset); ok {
			t.Errorf("there is no code at %#x", offset)
		}
	}
}

func FuzzProc(f *testing.F) {
	for _, name := range []string{"status", "maps"} {
		content, err := os.ReadFile("/proc/self/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(content)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		_ = parseStatus(content).serves()
		for _, m := range parseMaps(content) {
			if m.start >= m.end || m.end > userEnd {
				t.Fatalf("%+v", m)
			}
		}
	})
}

func FuzzProgram(f *testing.F) {
	content, err := os.ReadFile("/bin/true")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Fuzz(func(t *testing.T, content []byte) {
		r := bytes.NewReader(content)
		_ = checkProgram(r)
		var code [stubRoom]byte
		_, _ = entryPoint(r, &code)
	})
}

func TestClassify(t *testing.T) {
	for status, want := range map[unix.WaitStatus]stop{
		0x80<<16 | 5<<8 | 0x7f:  {kind: interruptStop},
		0x80<<16 | 19<<8 | 0x7f: {kind: groupStop},
		0x85<<8 | 0x7f:          {kind: syscallStop},
		5<<8 | 0x7f:             {kind: signalStop, signal: 5},
		10<<8 | 0x7f:            {kind: signalStop, signal: 10},
		64<<8 | 0x7f:            {kind: signalStop, signal: 64},
	} {
		if got := classify(status); got != want {
			t.Errorf("%#x: %+v, want %+v", uint32(status), got, want)
		}
	}
}

// layoutWithTiles is a processor with AMX: its tiles make the kernel's area 11,008 bytes long, but a thread that doesn't
// use them has 2,816.
var layoutWithTiles = &[64]extent{2: {576, 256}, 5: {1088, 64}, 6: {1152, 512}, 7: {1664, 1024}, 9: {2688, 8}, 17: {2752, 64}, 18: {2816, 8192}}

func regset(size int, features, inUse uint64) []byte {
	area := make([]byte, size)
	for i := range area {
		area[i] = byte(i * 7)
	}
	binary.LittleEndian.PutUint64(area[swReserved:], features)
	binary.LittleEndian.PutUint64(area[xsaveHeader:], inUse)
	clear(area[xsaveHeader+8 : xsaveExtended])
	return area
}

// The second magic number is where the frame says, and at every size that the thread's own area can have.
func TestSigframeXstate(t *testing.T) {
	le := binary.LittleEndian
	for _, test := range []struct {
		inUse, features uint64
		size, end       int
	}{
		{0, 3, 576, 576},
		{3, 7, 832, 576},
		{7, 7, 832, 832},
		{7, 0x602e7, 11008, 2696},
		{4, 0x600e7, 11008, 832},
		{0x602e7, 0x602e7, 11008, 11008},
	} {
		xstate := regset(test.size, test.features, test.inUse)
		area, err := sigframeXstate(xstate, layoutWithTiles)
		if err != nil {
			t.Fatal(err)
		}
		if le.Uint32(area[464:]) != 0x46505853 || le.Uint32(area[468:]) != uint32(test.end)+4 || le.Uint64(area[472:]) != test.features ||
			le.Uint32(area[480:]) != uint32(test.end) || le.Uint64(area[512:]) != test.inUse|3|test.features&0x200 {
			t.Errorf("%+v: % x", test, area[464:576])
		}
		if !bytes.Equal(area[:464], xstate[:464]) || !bytes.Equal(area[520:test.end], xstate[520:test.end]) {
			t.Errorf("%+v: the state was changed", test)
		}
		for at := test.end; at+4 <= len(area); at += 4 {
			if le.Uint32(area[at:]) != 0x46505845 {
				t.Errorf("%+v: no magic number at %d", test, at)
			}
		}
	}
	if _, err := sigframeXstate(regset(832, 7, 1<<18), layoutWithTiles); err == nil {
		t.Error("a component behind the end of the area")
	}
	if _, err := sigframeXstate(regset(832, 7, 1<<40), layoutWithTiles); err == nil {
		t.Error("a component that the processor doesn't have")
	}
}

func FuzzBuild(f *testing.F) {
	f.Add(uint64(0x7ffc12345678), uint64(7), uint64(7), 832, "/usr/lib/module.so")
	f.Add(uint64(0), uint64(0x602e7), uint64(0x602e7), 11008, "")
	f.Add(^uint64(0), ^uint64(0), ^uint64(0), 575, "x")
	f.Fuzz(func(t *testing.T, rsp, features, inUse uint64, size int, path string) {
		if size < 520 || size > 1<<17 {
			return
		}
		built, err := build(&unix.PtraceRegs{Rsp: rsp, Rip: 1}, regset(max(size, 576), features, inUse), 0, path, layoutWithTiles)
		if err != nil {
			return
		}
		end := built.context + uint64(len(built.image))
		if built.context%16 != 0 || end > rsp-redZone || built.slot+wordSize != end || built.path+uint64(len(path)) >= built.slot || built.context > built.path {
			t.Fatalf("rsp %#x: context %#x, path %#x, slot %#x, end %#x", rsp, built.context, built.path, built.slot, end)
		}
		fp := binary.LittleEndian.Uint64(built.image[scFPState:])
		if fp%64 != 0 || fp < built.context+ucSize || fp >= built.path {
			t.Fatalf("XSAVE area at %#x", fp)
		}
	})
}

func TestGoingBack(t *testing.T) {
	for result, again := range map[int64]bool{-512: true, -513: true, -514: true, -516: false, -4: false, 0: false, 3: false} {
		found := unix.PtraceRegs{Rax: uint64(result), Orig_rax: unix.SYS_PPOLL, Rip: 0x1000}
		want := found
		if again {
			want.Rax, want.Rip = unix.SYS_PPOLL, 0xffe
		}
		if got := goingBack(found); got != want {
			t.Errorf("%d: %+v", result, got)
		}
	}
}

// What the process's user may read decides, not what we may.
func TestResolve(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, sub := range []string{"", "/closed", "/open"} {
		if err := os.MkdirAll(dir+sub, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // which t.TempDir makes for us alone
		t.Fatal(err)
	}
	write := func(name string, mode os.FileMode) {
		if err := os.WriteFile(dir+name, nil, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir+name, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("/open/all", 0o644)
	write("/open/group", 0o640)
	write("/open/none", 0o600)
	write("/closed/all", 0o644)
	for from, to := range map[string]string{"/absolute": dir + "/open/all", "/relative": "open/../open/./all", "/up": "../../../../../../../.." + dir + "/open/all"} {
		if err := os.Symlink(to, dir+from); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir+"/closed", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir+"/open/group", 0, 77); err != nil {
		t.Fatal(err)
	}
	user := status{uid: 1000, gid: 1000, groups: []uint32{5, 77}}
	stranger := status{uid: 1001, gid: 1001}
	root := status{caps: 1 << unix.CAP_DAC_OVERRIDE}
	for _, test := range []struct {
		path string
		who  status
		why  string
	}{
		{"/open/all", user, ""},
		{"/open/group", user, ""},
		{"/open/group", stranger, "can't be read by the process (uid 1001"},
		{"/open/none", user, "can't be read by the process (uid 1000"},
		{"/open/none", root, ""},
		{"/closed/all", user, "can't be reached by the process (uid 1000"},
		{"/closed/all", status{}, ""},
		{"/absolute", user, ""},
		{"/relative", user, ""},
		{"/up", user, ""},
		{"//open//./../open/all", user, ""},
		{"/open/all/", user, "not a directory"},
		{"/open", user, "not a regular file"},
		{"/open/missing", user, "no such file"},
	} {
		found, err := resolve(os.Getpid(), dir+test.path, test.who)
		if test.why != "" {
			says(t, err, nil, test.why)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.path, err)
		} else if _, err := os.Stat(found); err != nil {
			t.Error(err)
		}
	}
}

// Without the right to read /proc/PID/map_files the file is found by its name, if it is still the same file.
func TestOpenMappedByName(t *testing.T) {
	path := copied(t, "doc.go", filepath.Join(t.TempDir(), "library"))
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	m := mapping{start: 1, end: 2, path: path, inode: st.Ino, dev: fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))}
	f, err := openMapped(os.Getpid(), m)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	m.inode++
	_, err = openMapped(os.Getpid(), m)
	says(t, err, nil, "has been replaced")
}
