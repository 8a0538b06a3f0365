package host

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStat(t *testing.T) {
	const rest = " 1 2 3 0 -1 4194560 5 6 7 8 9 10 11 12 20 0 1 0 "
	for name, c := range map[string]struct {
		text string
		want Stat
	}{
		"plain":              {"12 (bash) S" + rest + "4711 100 200\n", Stat{'S', 4711}},
		"spaces":             {"12 (a b c) R" + rest + "4712 0\n", Stat{'R', 4712}},
		"parentheses":        {"12 (a) S (b) Z" + rest + "4713 0\n", Stat{'Z', 4713}},
		"only a parenthesis": {"12 ()) T" + rest + "4714 0\n", Stat{'T', 4714}},
		"looks like a stat":  {"12 (x) R" + rest + "1) D" + rest + "4715 0\n", Stat{'D', 4715}},
		"a line end":         {"12 (a\nb) S" + rest + "4716 0\n", Stat{'S', 4716}},
		"no name":            {"12 () I" + rest + "4717 0\n", Stat{'I', 4717}},
		"as late as it gets": {"12 (a) S" + rest + "18446744073709551615\n", Stat{'S', math.MaxUint64}},
		"zombie's zero":      {"12 (a) Z" + rest + "0\n", Stat{'Z', 0}},
	} {
		if got, err := parseStat([]byte(c.text)); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", ")", "12 (a", "12 (a) S 1 2", "12 (a) S" + rest, "12 (a) S" + rest + "x", "12 (a) S" + rest + "-1",
		"12 (a) S" + rest + "18446744073709551616"} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

// A process tells its start with the clock of the kernel, whatever it calls itself.
func TestReadStat(t *testing.T) {
	program := filepath.Join(t.TempDir(), "a) R 1 (") // 8 of the 15 characters that the kernel takes of it
	if err := os.Symlink("/bin/sleep", program); err != nil {
		t.Fatal(err)
	}
	self, err := ReadStat(os.Getpid())
	if err != nil || self.Started == 0 {
		t.Fatalf("%+v, %v", self, err)
	}
	cmd := exec.Command(program, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first, err := ReadStat(cmd.Process.Pid)
	if err != nil || first.Started < self.Started {
		t.Errorf("%+v, %v; this process: %+v", first, err, self)
	}
	_ = cmd.Process.Kill()
	for s := first; s.State != 'Z'; time.Sleep(time.Millisecond) {
		if s, err = ReadStat(cmd.Process.Pid); err != nil || s.Started != first.Started {
			t.Fatalf("%+v, %v; before: %+v", s, err, first)
		}
		if s.State == 'Z' {
			break
		}
	}
	_ = cmd.Wait()
	if s, err := ReadStat(cmd.Process.Pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("buried: %+v, %v", s, err)
	}
}

func FuzzStat(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(own))
	f.Add("1 () S 1")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseStat([]byte(text))
		if err != nil && s != (Stat{}) {
			t.Errorf("%+v with %v", s, err)
		}
		// What comes before the last parenthesis changes nothing.
		if again, err2 := parseStat([]byte("1 (x) Z 9 9 (" + text)); strings.Contains(text, ")") && (again != s || (err == nil) != (err2 == nil)) {
			t.Errorf("%+v, %v; behind another name: %+v, %v", s, err, again, err2)
		}
	})
}

func TestReadPID(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.pid")
	if _, err := ReadPID(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	for text, want := range map[string]int{"4711": 4711, "4711\n": 4711, " 2 \n": 2, "1": 0, "0": 0, "-5": 0, "": 0, "12 13": 0, "99999999999999999999": 0, "x": 0} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadPID(file); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
}

func TestPIDFile(t *testing.T) {
	for name, want := range map[string]string{
		"web1": "/r/web1.pid", "a b": "/r/a b.pid", `<&>"'`: "/r/&lt;&amp;&gt;&quot;&apos;.pid", "&amp;": "/r/&amp;amp;.pid",
	} {
		if got := PIDFile("/r", name); got != want {
			t.Errorf("%q: %s", name, got)
		}
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	for _, content := range []string{"one", "", "another, longer one"} {
		if err := WriteFile(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		info, failed := os.Stat(path)
		if err != nil || failed != nil || string(got) != content || info.Mode() != 0o600 {
			t.Errorf("%q, %v; %v, %v", got, err, info.Mode(), failed)
		}
	}
	// What is in the way stays, and nothing is left beside it.
	if err := os.MkdirAll(filepath.Join(dir, "b", "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "b"), []byte("x")); err == nil {
		t.Error("a directory was replaced")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestAwaitEnd(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	done := make(chan bool)
	go func() { AwaitEnd(fd); close(done) }()
	select {
	case <-done:
		t.Error("it has ended while it lives")
	case <-time.After(50 * time.Millisecond):
	}
	_ = cmd.Process.Kill()
	<-done
	_ = cmd.Wait()
	AwaitEnd(fd) // of one that is buried
}

func TestClockOf(t *testing.T) {
	for name, c := range map[string]struct {
		timex unix.Timex
		state int
		want  Clock
	}{
		"nominal":      {unix.Timex{Tick: 10000}, unix.TIME_OK, Clock{Synchronised: true}},
		"fast":         {unix.Timex{Tick: 10000, Freq: 20 << 16, Maxerror: 1500}, unix.TIME_OK, Clock{Synchronised: true, MaximumError: 1_500_000, Rate: 20_000}},
		"slow":         {unix.Timex{Tick: 9999, Freq: -(1 << 15)}, unix.TIME_OK, Clock{Synchronised: true, Rate: -100_500}},
		"unkept":       {unix.Timex{Tick: 10000, Status: unix.STA_UNSYNC}, unix.TIME_OK, Clock{}},
		"error":        {unix.Timex{Tick: 10000, Maxerror: 16_000_000}, unix.TIME_ERROR, Clock{MaximumError: 16_000_000_000}},
		"impossible":   {unix.Timex{Tick: 10000, Maxerror: -1, Esterror: -1}, unix.TIME_OK, Clock{Synchronised: true}},
		"microseconds": {unix.Timex{Tick: 10000, Offset: -7, Esterror: 3}, unix.TIME_OK, Clock{Synchronised: true, Offset: -7000, EstimatedError: 3000}},
		"nanoseconds":  {unix.Timex{Tick: 10000, Offset: -7, Status: unix.STA_NANO}, unix.TIME_OK, Clock{Synchronised: true, Offset: -7}},
		"a leap comes": {unix.Timex{Tick: 10000, Status: unix.STA_INS}, unix.TIME_INS, Clock{Synchronised: true}},
	} {
		if got := clockOf(&c.timex, c.state); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestReadClock(t *testing.T) {
	c, err := ReadClock()
	if errors.Is(err, unix.EPERM) {
		t.Skip("adjtimex isn't permitted here; fix: run outside of the sandbox")
	}
	if err != nil || c.MaximumError < 0 || c.Rate < -1e9 || c.Rate > 1e9 {
		t.Errorf("%+v, %v", c, err)
	}
}

// The kernel is asked, and told nothing: it would set the clock.
func TestTheClockIsOnlyRead(t *testing.T) {
	failure := errors.New("not permitted")
	adjtimex = func(x *unix.Timex) (int, error) {
		if *x != (unix.Timex{}) {
			t.Errorf("the kernel was given %+v", *x)
		}
		x.Tick, x.Maxerror = 10000, 2000
		return unix.TIME_OK, failure
	}
	defer func() { adjtimex = unix.Adjtimex }()
	if c, err := ReadClock(); !errors.Is(err, failure) || c != (Clock{}) {
		t.Errorf("%+v, %v", c, err)
	}
	failure = nil
	if c, err := ReadClock(); err != nil || c != (Clock{Synchronised: true, MaximumError: 2_000_000}) {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestBootID(t *testing.T) {
	if id := BootID(); !IsUUID(id) || id != BootID() {
		t.Errorf("%q", id)
	}
}

func TestMemoryFiles(t *testing.T) {
	const content = "what never changes"
	constant, err := ConstantFile("constant", []byte(content))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(constant)
	sized, err := SizedFile("sized", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sized)
	text := make([]byte, 100)
	if n, err := unix.Pread(constant, text, 0); err != nil || string(text[:n]) != content {
		t.Errorf("%q, %v", text[:max(n, 0)], err)
	}
	if _, err := unix.Pwrite(constant, []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("a constant is written to: %v", err)
	}
	if n, err := unix.Pwrite(sized, []byte("x"), 4095); n != 1 || err != nil {
		t.Errorf("a sized file isn't written to: %d, %v", n, err)
	}
	if _, err := unix.Pwrite(sized, []byte("x"), 4096); !errors.Is(err, unix.EPERM) {
		t.Errorf("a sized file grows: %v", err)
	}
	for _, fd := range []int{constant, sized} {
		if err := unix.Ftruncate(fd, 1); !errors.Is(err, unix.EPERM) {
			t.Errorf("it shrinks: %v", err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE); !errors.Is(err, unix.EPERM) {
			t.Errorf("it takes more seals: %v", err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("programs inherit it: %#x, %v", flags, err)
		}
	}
	// A name that is too long is an error, and no descriptor.
	if fd, err := SizedFile(strings.Repeat("x", 300), 1); err == nil || fd != -1 {
		t.Errorf("%d, %v", fd, err)
	}
}

func TestLines(t *testing.T) {
	for text, want := range map[string][2]string{
		"a b":                       {"a b", "a b"},
		" a  b ":                    {" a  b ", "a b"},
		"a\nb\x1b[31mc\x00\xff\n":   {"a b [31mc \ufffd ", "a b [31mc \ufffd"},
		"µs − “quoted” …":           {"µs − “quoted” …", "µs − “quoted” …"},
		"\u202eright to left\u200b": {" right to left ", "right to left"},
		"\r\n\t\v\f\u0085\u2028":    {strings.Repeat(" ", 7), ""},
		"":                          {"", ""},
	} {
		if got := Printable(text); got != want[0] {
			t.Errorf("Printable(%q): %q, want %q", text, got, want[0])
		}
		if got := OneLine(text); got != want[1] {
			t.Errorf("OneLine(%q): %q, want %q", text, got, want[1])
		}
	}
	if got := ErrorLine(errors.Join(errors.New("one\x1b[2J"), errors.New("two\n"))); got != "one [2J; two" {
		t.Errorf("%q", got)
	}
}

func TestUUID(t *testing.T) {
	const id = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	for text, want := range map[string]string{
		id: id, strings.ToUpper(id): id, "6695EB01F6A4830479AA97F2502E193F": id, "-6695eb01f6a4-830479aa97f2502e193f": id,
		"": "", "test": "", id[:35]: "", id[:35] + "g": "", id + "0": "", id[:35] + "\n": "", id[:34] + "é": "", id[:8] + "_" + id[9:]: "",
	} {
		if got, ok := UUID(text); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %t", text, got, ok)
		}
		if got := IsUUID(text); got != (text == id) {
			t.Errorf("IsUUID(%q): %t", text, got)
		}
	}
}

func TestNanoseconds(t *testing.T) {
	for ns, want := range map[uint64]string{
		0: "0 ns", 1: "1 ns", 999: "999 ns", 1_000: "1.00 µs", 9_994: "9.99 µs", 9_996: "10.0 µs", 99_960: "100 µs", 999_499: "999 µs",
		999_500: "1.00 ms", 5_010_000: "5.01 ms", 599_123_456: "599 ms", 999_499_999: "999 ms", 999_500_000: "0.99 s",
		1_000_000_000: "1.00 s", 59_999_999_999: "59.99 s", 60_000_000_000: "1m00s", 3_599_999_999_999: "59m59s",
		3_600_000_000_000: "1h00m", 100 * 3_600_000_000_000: "4d04h", math.MaxUint64: "213503d23h",
	} {
		if got := Nanoseconds(ns); got != want {
			t.Errorf("%d: got %q, want %q", ns, got, want)
		}
	}
	for ns, want := range map[int64]string{0: "0 ns", 7: "+7 ns", -7: "-7 ns", -2_500: "-2.50 µs", math.MinInt64: "-106751d23h"} {
		if got := SignedNanoseconds(ns); got != want {
			t.Errorf("%d: got %q, want %q", ns, got, want)
		}
	}
}

// A process may make its command line as long as its memory.
func TestReadTextIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cmdline")
	if err := os.WriteFile(path, []byte("qemu\x00-S\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := ReadText(path); err != nil || string(text) != "qemu\x00-S\x00" {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.Truncate(path, 1<<43); err != nil {
		t.Fatal(err)
	}
	if text, err := ReadText(path); err != nil || len(text) != maxText || !strings.HasPrefix(string(text), "qemu\x00-S\x00") {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}

func TestEnded(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := OpenProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if Ended(pidfd) {
		t.Error("it runs")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if !Ended(pidfd) {
		t.Error("it has ended")
	}
}
