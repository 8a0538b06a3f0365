package policy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ftclock/test/check"
	metadata "ftclock/xml-templates"
)

const content = `<policy xmlns="urn:ftclock:policy:1"><for name="%s"/><clock xmlns="urn:ftclock:domain:1"%s/></policy>`

func write(t testing.TB, dir, name, pattern, attributes string) {
	t.Helper()
	check.NoError(t, os.WriteFile(filepath.Join(dir, name), fmt.Appendf(nil, content, pattern, attributes), 0o644))
}

func subject(t testing.TB, name string) *metadata.Subject {
	t.Helper()
	return check.Value(metadata.ReadSubject(name, "", []byte("<domain/>")))(t)
}

func TestFilesCountInTheOrderOfTheirNames(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"20-web.xml", "10-all.xml", "30-db.xml"} {
		write(t, dir, name, map[string]string{"10-all.xml": "*-1", "20-web.xml": "web-*", "30-db.xml": "db-*"}[name], "")
	}
	write(t, dir, "notes.txt", "*", "")
	write(t, dir, ".10-all.xml.swp", "*", "")
	write(t, dir, ".hidden.xml", "*", "")
	files := check.Value(Read(dir))(t)
	if len(files) != 3 {
		t.Fatalf("files: %+v", files)
	}
	for name, want := range map[string]string{"web-1": "10-all.xml 20-web.xml", "web-2": "20-web.xml", "db-1": "10-all.xml 30-db.xml", "mail": ""} {
		var got []string
		for _, f := range Naming(files, subject(t, name)) {
			if f.Err != nil {
				t.Error(f.Err)
			}
			got = append(got, filepath.Base(f.Path))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s is named by %q, want %q", name, got, want)
		}
	}
}

func TestWhatIsWrongWithAFile(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		want string
	}{
		"bad XML":     {func(p string) error { return os.WriteFile(p, []byte("<policy"), 0o644) }, "broken XML"},
		"a wrong one": {func(p string) error { return os.WriteFile(p, fmt.Appendf(nil, content, "*", ` mode="x"`), 0o644) }, "/policy/clock/@mode (line 1): unknown attribute"},
		"too long":    {func(p string) error { return os.WriteFile(p, make([]byte, maxSize+1), 0o644) }, "longer than"},
		"a folder":    {func(p string) error { return os.Mkdir(p, 0o755) }, "is a directory"},
		"a pipe":      {func(p string) error { return syscall.Mkfifo(p, 0o644) }, "is no file: remove it"},
		"a lost link": {func(p string) error { return os.Symlink("nowhere", p) }, "no such file"},
		"others may write": {func(p string) error {
			_ = os.WriteFile(p, fmt.Appendf(nil, content, "*", ""), 0o644)
			return os.Chmod(p, 0o664)
		}, "can be written by others than its owner, so that it isn't used: chmod go-w "},
		"another's": {func(p string) error {
			_ = os.WriteFile(p, fmt.Appendf(nil, content, "*", ""), 0o644)
			return os.Chown(p, 65534, -1)
		}, "belongs to user 65534, so that it isn't used: chown root "},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "another's" && os.Geteuid() != 0 {
				t.Skip("not root: nobody else's file can be made")
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "a.xml")
			check.NoError(t, c.make(path))
			write(t, dir, "b.xml", "*", "")
			files := check.Value(Read(dir))(t)
			if len(files) != 2 || files[0].Err == nil || files[1].Err != nil {
				t.Fatalf("%+v", files)
			}
			if text := files[0].Err.Error(); !strings.Contains(text, c.want) || !strings.Contains(text, path) || strings.Contains(text, "\n") {
				t.Errorf("%q, want %q", text, c.want)
			}
			// It takes no domain away from the others, unless it is known to name it.
			if got := Naming(files, subject(t, "web")); len(got) == 0 || len(got) == 2 != (name == "a wrong one") {
				t.Errorf("web is named by %+v", got)
			}
		})
	}
}

func TestTheDirectory(t *testing.T) {
	if files, err := Read(filepath.Join(t.TempDir(), "missing")); err != nil || files != nil {
		t.Errorf("where there is none: %v, %v", files, err)
	}
	dir := t.TempDir()
	check.NoError(t, os.Chmod(dir, 0o777))
	if _, err := Read(dir); err == nil || !strings.Contains(err.Error(), "can be written by others") {
		t.Errorf("where all may write: %v", err)
	}
	check.NoError(t, os.Chmod(dir, 0o755))
	for n := range MaxFiles {
		write(t, dir, fmt.Sprintf("%05d.xml", n), "web", "")
	}
	if files, err := Read(dir); err != nil || len(files) != MaxFiles {
		t.Errorf("as many as there may be: %d, %v", len(files), err)
	}
	for n := MaxFiles; n < 10_000; n++ {
		check.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d.xml", n)), nil, 0o644))
	}
	if _, err := Read(dir); err == nil || !strings.Contains(err.Error(), "has more than 32 files, so that none is used") {
		t.Errorf("10,000: %v", err)
	}
}

// What a start waits for: the most files that there may be, and more than those.
func BenchmarkRead(b *testing.B) {
	for _, n := range []int{1, MaxFiles, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			for i := range n {
				write(b, dir, fmt.Sprintf("%05d.xml", i), "web-*", "")
			}
			d := subject(b, "db")
			for b.Loop() {
				files, _ := Read(dir)
				Naming(files, d)
			}
		})
	}
}
