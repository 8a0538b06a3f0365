package attach

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/test/check"
)

// descriptors are what the process has open.
func descriptors(t *testing.T, pid int) (all []string) {
	t.Helper()
	for _, entry := range check.Value(os.ReadDir(procPath(pid, "fd")))(t) {
		link, err := os.Readlink(procPath(pid, "fd/"+entry.Name()))
		check.NoError(t, err)
		all = append(all, link)
	}
	slices.Sort(all)
	return all
}

// The process is given the library, whatever it sees of our files, and all else of it is as it was.
func TestSealed(t *testing.T) {
	needRoot(t)
	for _, words := range [][]string{{}, {"forever"}, {"mask", "mixed"}} {
		t.Run(strings.Join(words, " "), func(t *testing.T) {
			g := start(t, targetProgram(t), words...)
			_, bad := libraries(t, 0)
			before := descriptors(t, g.pid)
			for range 3 {
				_, err := loadBy(patience(t), g.pid, bad, anyProgram, surveySealed)
				says(t, err, ErrDlopen, "invalid ELF header")
				g.fine()
			}
			if now := descriptors(t, g.pid); !slices.Equal(now, before) {
				t.Errorf("descriptors before %q, after %q", before, now)
			}
			check.Value(loadBy(patience(t), g.pid, module(t), anyProgram, surveySealed))(t)
			g.fine()
			if want := append(before, pageLink); !slices.Equal(descriptors(t, g.pid), sorted(want)) {
				t.Errorf("descriptors %q, want %q", descriptors(t, g.pid), want)
			}
			mapped := slices.IndexFunc(mapsOf(t, g.pid), func(m mapping) bool { return m.path == memoryLink && m.perms == "r-xp" })
			if mapped < 0 {
				t.Error("the library isn't a memory file")
			}
			if !g.startIsClean() {
				t.Error("_start isn't as in the file")
			}
		})
	}
}

func sorted(all []string) []string {
	slices.Sort(all)
	return all
}

// What is mapped can't be written to by anybody.
func TestSealedIsSealed(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t), "forever")
	s := check.Value(surveySealed(g.pid, module(t), anyProgram))(t)
	defer s.close()
	fd := check.Value(unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING))(t)
	defer unix.Close(fd)
	s.pid = os.Getpid()
	check.NoError(t, s.fill(fd))
	if seals := check.Value(unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0))(t); seals != memorySeals {
		t.Errorf("seals: %#x", seals)
	}
	if _, err := unix.Pwrite(fd, []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("it can be written to: %v", err)
	}
	if err := s.fill(fd); err == nil {
		t.Error("it was filled again")
	}
	// What the process has put there instead isn't written to.
	path := filepath.Join(t.TempDir(), "other")
	other := check.Value(os.Create(path))(t)
	defer other.Close()
	says(t, s.fill(int(other.Fd())), nil, "the process has "+path+" there")
}

// What the process puts there at the last moment isn't written to either: a file that it may only read, of a tmpfs like /run.
func TestNoFileIsTakenForAMemoryFile(t *testing.T) {
	var fs unix.Statfs_t
	check.NoError(t, unix.Statfs("/dev/shm", &fs))
	if fs.Type != unix.TMPFS_MAGIC {
		t.Fatal("missing: a tmpfs at /dev/shm")
	}
	other := check.Value(os.CreateTemp("/dev/shm", memoryName))(t)
	defer os.Remove(other.Name())
	defer other.Close()
	if fresh(other) {
		t.Error("a file of a tmpfs is taken for a memory file")
	}
	for flags, want := range map[int]bool{unix.MFD_ALLOW_SEALING: true, 0: false} {
		fd := check.Value(unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC|flags))(t)
		f := os.NewFile(uintptr(fd), memoryName)
		if got := fresh(f); got != want {
			t.Errorf("flags %#x: %t", flags, got)
		}
		f.Close()
	}
}

// One that is root of a user namespace and the first process of a pid namespace, and has nothing where we have the library.
func TestSealedInNamespaces(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	check.NoError(t, os.Chmod(dir, 0o755))
	check.NoError(t, os.Chmod(filepath.Dir(dir), 0o755)) // which t.TempDir makes for us alone
	library := copied(t, module(t), filepath.Join(dir, "module.so"))
	program := copied(t, targetProgram(t), filepath.Join(dir, "target"))
	const script = `mount -t proc proc /proc && exec 3<"$1" && mount -t tmpfs none "$2" && exec /proc/self/fd/3`
	cmd := exec.Command("sh", "-c", script, "sh", program, dir)
	ids := []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		UidMappings: ids, GidMappings: ids, Credential: &syscall.Credential{},
	}
	g := startCommand(t, cmd)
	_, err := load(patience(t), g.pid, library, anyProgram)
	says(t, err, nil, "can't be found by the process")
	check.Value(loadBy(patience(t), g.pid, library, anyProgram, surveySealed))(t)
	if _, ok, err := Loaded(g.pid); !ok || err != nil {
		t.Error(ok, err)
	}
	if left := check.Value(os.ReadDir(procPath(g.pid, "root"+dir)))(t); len(left) > 0 {
		t.Errorf("something was written there: %v", left)
	}
	g.fine()
}
