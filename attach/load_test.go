package attach

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	testbuilt "ftclock/test/built"
	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

// libraries makes n copies of the module, and a file that is none.
func libraries(t *testing.T, n int) (good []string, bad string) {
	t.Helper()
	dir := t.TempDir()
	for i := range n {
		good = append(good, copied(t, module(t), filepath.Join(dir, fmt.Sprintf("module%d.so", i))))
	}
	bad = filepath.Join(dir, "bad.so")
	check.NoError(t, os.WriteFile(bad, []byte(strings.Repeat("no ELF file\n", 20)), 0o644))
	return good, bad
}

// Every register, the red zone, the signal mask and the alternate stack are as they were, however ppoll is used.
func TestRegistersComeBack(t *testing.T) {
	needRoot(t)
	for _, words := range [][]string{{}, {"forever"}, {"mask"}, {"mixed"}, {"signals"}, {"signals", "mask", "mixed"}} {
		t.Run(strings.Join(words, " "), func(t *testing.T) {
			g := start(t, targetProgram(t), words...)
			good, bad := libraries(t, 20)
			stop := make(chan struct{})
			var hammer sync.WaitGroup
			if len(words) > 0 && words[0] == "signals" {
				hammer.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
							_ = unix.Kill(g.pid, unix.SIGUSR1)
							time.Sleep(50 * time.Microsecond)
						}
					}
				})
			}
			for i := range 60 {
				path := good[i%len(good)]
				if i%3 == 2 {
					path = bad
				}
				_, err := load(patience(t), g.pid, path, anyProgram)
				if want := path == bad; errors.Is(err, ErrDlopen) != want || (err != nil) != want {
					t.Fatalf("loading %s: %v", path, err)
				}
				g.ask()
			}
			close(stop)
			hammer.Wait()
			g.fine()
			if !g.startIsClean() {
				t.Error("_start isn't as in the file")
			}
			if len(words) > 0 && words[0] == "signals" {
				_, before := g.ask()
				for {
					if _, after := g.ask(); after > before {
						break // signals still arrive
					}
				}
			}
		})
	}
}

func TestDlopenSaysWhy(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t))
	_, bad := libraries(t, 0)
	for _, n := range []int{1, 2} {
		_, err := load(patience(t), g.pid, bad, anyProgram)
		if !errors.Is(err, ErrDlopen) || !strings.Contains(err.Error(), bad+": invalid ELF header") {
			t.Fatalf("load %d: %v", n, err)
		}
	}
	g.ask()
}

// A main thread that is never in ppoll is left alone.
func TestBusy(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t), "busy")
	s := g.survey(module(t))
	defer s.close()
	check.NoError(t, s.warm())
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	result, err := s.inject(ctx)
	if !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) || result.Attempts < 2 {
		t.Fatalf("%+v, %v", result, err)
	}
	// Nor is anything done to it when it is stopped anyway, somewhere in the allocator.
	for range 200 {
		onOwnThread(func() {
			tr := &tracee{pid: g.pid}
			if err = tr.seize(); err == nil {
				if err = tr.stop(context.Background()); err == nil {
					err = s.call(tr)
				}
				tr.detach()
			}
		})
		if !errors.Is(err, errNotIdle) {
			t.Fatal(err)
		}
	}
	g.fine()
}

// A main thread that can't be stopped in time is let go all the same, when the tracing thread ends.
func TestUninterruptible(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t), "vforks")
	var err error
	for !errors.Is(err, ErrBusy) {
		onOwnThread(func() {
			tr := &tracee{pid: g.pid}
			if err = tr.seize(); err != nil {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
			defer cancel()
			err = tr.stop(ctx)
			tr.detach()
		})
		if err != nil && !errors.Is(err, ErrBusy) {
			t.Fatal(err)
		}
	}
	says(t, err, ErrBusy, "doesn't stop")
	if tracer := statusField(t, g.pid, "TracerPid"); tracer != "0" {
		t.Fatal("still traced by", tracer)
	}
	g.fine()
}

// The kernel lets go of what a thread still traces when it ends: who asks after onOwnThread must not come too early.
func TestOwnThreadHasEnded(t *testing.T) {
	for range 200 {
		var thread int
		onOwnThread(func() { thread = unix.Gettid() })
		if err := unix.Tgkill(os.Getpid(), thread, 0); !errors.Is(err, unix.ESRCH) {
			t.Fatalf("thread %d is still there: %v", thread, err)
		}
	}
}

// The target is killed while it is attached to.
func TestKilledMeanwhile(t *testing.T) {
	needRoot(t)
	good, bad := libraries(t, 3)
	for range 100 {
		g := start(t, targetProgram(t))
		s := g.survey(good[0])
		go func() {
			time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
			_ = unix.Kill(g.pid, unix.SIGKILL)
		}()
		var err error
		for i := 0; err == nil || errors.Is(err, ErrDlopen); i++ {
			s.library = append(good, bad)[i%4]
			_, err = s.inject(patience(t))
		}
		if !errors.Is(err, ErrGone) {
			t.Fatal(err)
		}
		s.close()
		g.kill()
		if _, _, err := Loaded(g.pid); !errors.Is(err, ErrGone) {
			t.Fatalf("Loaded of a process that has ended: %v", err)
		}
	}
}

// The tracer is killed at any moment: the target never notices, and the next load succeeds.
func TestTracerDies(t *testing.T) {
	needRoot(t)
	deaths := 150
	if testing.Short() {
		deaths = 20
	}
	for _, words := range [][]string{{"forever"}, {"mask", "mixed"}} {
		t.Run(strings.Join(words, " "), func(t *testing.T) {
			g := start(t, targetProgram(t), words...)
			good, bad := libraries(t, 50)
			s := g.survey(good[0])
			defer s.close()
			midway := 0
			for range deaths {
				cmd := inRole("loader", append([]string{fmt.Sprint(g.pid), bad}, good...)...)
				stdout := check.Value(cmd.StdoutPipe())(t)
				check.NoError(t, cmd.Start())
				if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
					t.Fatalf("the tracer says %q, %v", line, err)
				}
				time.Sleep(time.Duration(rand.IntN(10000)) * time.Microsecond)
				check.NoError(t, cmd.Process.Kill())
				rest, _ := io.ReadAll(stdout)
				_ = cmd.Wait()
				if len(rest) > 0 {
					t.Fatalf("the tracer says %s", rest)
				}
				if g.start(s) != s.code {
					midway++
				}
				g.fine()
			}
			t.Logf("%d of %d tracers died between writing the stub and taking it away", midway, deaths)
			if midway == 0 {
				t.Error("no tracer died midway: this test has tested nothing")
			}
			last := copied(t, module(t), filepath.Join(t.TempDir(), "last.so"))
			check.Value(load(patience(t), g.pid, last, anyProgram))(t)
			g.fine()
			if !g.startIsClean() {
				t.Error("_start isn't as in the file")
			}
		})
	}
}

// The tracer dies before each of its requests in turn. Between two of them nothing of the target changes.
func TestTracerDiesAnywhere(t *testing.T) {
	needRoot(t)
	for _, words := range [][]string{{"forever"}, {"signals", "mask"}} {
		for _, kind := range []string{"good", "bad", "sealed", "bad sealed"} {
			t.Run(kind+" "+strings.Join(words, " "), func(t *testing.T) {
				g := start(t, targetProgram(t), words...)
				dir := t.TempDir()
				_, path := libraries(t, 0)
				deaths := 0
				for died := true; died; deaths++ {
					if kind == "good" || kind == "sealed" {
						path = copied(t, module(t), filepath.Join(dir, fmt.Sprintf("module%d.so", deaths)))
					}
					out, err := inRole("mortal", fmt.Sprint(g.pid), path, fmt.Sprint(deaths+1), kind).CombinedOutput()
					died = err != nil && err.Error() == "signal: killed"
					if !died && err != nil {
						t.Fatalf("death %d: %v: %s", deaths+1, err, out)
					}
					g.fine()
				}
				t.Logf("%d deaths", deaths-1)
				if deaths < 40 {
					t.Error("the tracer makes more requests than that")
				}
				if !g.startIsClean() {
					t.Error("_start isn't as in the file")
				}
			})
		}
	}
}

// SIGSTOP while dlopen runs: the load waits for SIGCONT, and the process is stopped as it should be.
func TestStoppedMeanwhile(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t))
	stops := built(t, testbuilt.TargetStops)
	done := make(chan error, 1)
	go func() {
		_, err := load(context.Background(), g.pid, stops, anyProgram)
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			g.fine()
			return
		case <-time.After(5 * time.Millisecond):
			if _, ok, err := Loaded(g.pid); err != nil {
				t.Fatal(err)
			} else if ok {
				_ = unix.Kill(g.pid, unix.SIGCONT)
			}
		}
	}
}

// Code that is neither the program's nor ours is not written over.
func TestForeignStartCode(t *testing.T) {
	needRoot(t)
	g := start(t, targetProgram(t))
	s := g.survey(module(t))
	defer s.close()
	check.Value(s.mem.WriteAt([]byte{0xcc}, int64(s.entry)+3))(t)
	if _, err := s.inject(patience(t)); !errors.Is(err, ErrNoSlot) {
		t.Fatal(err)
	}
	if _, err := load(patience(t), g.pid, module(t), anyProgram); !errors.Is(err, ErrNoSlot) {
		t.Fatal(err)
	}
	g.ask()
}

func TestRefusals(t *testing.T) {
	needRoot(t)
	mod := module(t)
	t.Run("not qemu", func(t *testing.T) {
		g := start(t, targetProgram(t))
		refuses(t, g.pid, mod, ErrNotQEMU, "the program is")
		if _, ok, err := Loaded(g.pid); ok || err != nil {
			t.Fatal(ok, err)
		}
	})
	t.Run("no virtual machine", func(t *testing.T) {
		g := start(t, copied(t, targetProgram(t), filepath.Join(t.TempDir(), "qemu-system-test")))
		refuses(t, g.pid, mod, ErrNotQEMU, "no virtual machine")
	})
	t.Run("thread of the kernel", func(t *testing.T) {
		refuses(t, 2, mod, ErrNotQEMU, "thread of the kernel")
	})
	t.Run("lazy", func(t *testing.T) {
		g := start(t, built(t, testbuilt.TargetLazy))
		_, err := load(patience(t), g.pid, mod, anyProgram)
		says(t, err, ErrNoSlot, "bound lazily")
	})
	t.Run("static", func(t *testing.T) {
		g := start(t, built(t, testbuilt.TargetStatic))
		_, err := load(patience(t), g.pid, mod, anyProgram)
		says(t, err, ErrNoSlot, "statically linked")
	})
	t.Run("musl", func(t *testing.T) {
		g := start(t, built(t, testbuilt.TargetMusl))
		for _, survey := range []surveyor{survey, surveySealed} {
			_, err := loadBy(patience(t), g.pid, mod, anyProgram, survey)
			says(t, err, ErrNoSlot, "built for the C library musl (its dynamic linker is /lib/ld-musl-x86_64.so.1), and the module needs glibc")
		}
		g.ask()
	})
	t.Run("traced", func(t *testing.T) {
		g := start(t, targetProgram(t))
		s := g.survey(mod)
		defer s.close()
		cmd := inRole("holder", fmt.Sprint(g.pid))
		stdin := check.Value(cmd.StdinPipe())(t)
		h := &target{t: t, cmd: cmd, stdin: stdin}
		stdout := check.Value(cmd.StdoutPipe())(t)
		check.NoError(t, cmd.Start())
		defer h.kill()
		if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
			t.Fatalf("the tracer says %q, %v", line, err)
		}
		// Once before, once at the seizing.
		_, err := load(patience(t), g.pid, mod, anyProgram)
		says(t, err, ErrTraced, fmt.Sprintf("by process %d (", cmd.Process.Pid))
		_, err = s.inject(patience(t))
		says(t, err, ErrTraced, fmt.Sprintf("by process %d (", cmd.Process.Pid))
		g.ask()
	})
	t.Run("stopped", func(t *testing.T) {
		g := start(t, targetProgram(t), "forever")
		s := g.survey(mod)
		defer s.close()
		check.NoError(t, unix.Kill(g.pid, unix.SIGSTOP))
		for !strings.HasPrefix(statusField(t, g.pid, "State"), "T") {
			time.Sleep(time.Millisecond)
		}
		_, err := load(patience(t), g.pid, mod, anyProgram)
		says(t, err, ErrBusy, "SIGCONT")
		_, err = s.inject(patience(t))
		says(t, err, ErrBusy, "SIGCONT")
		if state := statusField(t, g.pid, "State"); !strings.HasPrefix(state, "T") {
			t.Errorf("the target isn't stopped any more: %s", state)
		}
		check.NoError(t, unix.Kill(g.pid, unix.SIGCONT))
		g.ask()
	})
	t.Run("zombie", func(t *testing.T) {
		g := start(t, targetProgram(t))
		s := g.survey(mod)
		defer s.close()
		check.NoError(t, unix.Kill(g.pid, unix.SIGKILL))
		for !strings.HasPrefix(statusField(t, g.pid, "State"), "Z") {
			time.Sleep(time.Millisecond)
		}
		refuses(t, g.pid, mod, ErrGone, "zombie")
		_, err := s.inject(patience(t))
		says(t, err, ErrGone, "")
	})
	t.Run("not permitted", func(t *testing.T) {
		g := start(t, targetProgram(t))
		out, err := inRole("nobody", fmt.Sprint(g.pid), mod).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "CAP_SYS_PTRACE") {
			t.Fatalf("%s, %v", out, err)
		}
	})
	t.Run("library", func(t *testing.T) {
		g := start(t, targetProgram(t))
		dir := t.TempDir()
		check.NoError(t, os.Symlink("loop", dir+"/loop"))
		check.NoError(t, unix.Mkfifo(dir+"/fifo", 0o644))
		for path, why := range map[string]string{
			"module.so":                     "not an absolute path",
			"/" + strings.Repeat("a", 5000): "not an absolute path of less",
			dir + "/missing.so":             "no such file",
			dir:                             "not a regular file",
			dir + "/fifo":                   "not a regular file",
			dir + "/loop":                   "bad symbolic link",
			mod + "/x":                      "not a directory",
		} {
			_, err := load(patience(t), g.pid, path, anyProgram)
			says(t, err, nil, why)
		}
		g.ask()
	})
}

func refuses(t *testing.T, pid int, library string, want error, text string) {
	t.Helper()
	says(t, Check(pid, library), want, text)
	_, err := Load(patience(t), pid, library)
	says(t, err, want, text)
}

// says checks for an error, and that it is one line.
func says(t *testing.T, err, want error, text string) {
	t.Helper()
	if err == nil || (want != nil && !errors.Is(err, want)) || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v, want %v with %q", err, want, text)
	}
}

// The program, its C library and a symbolic link to the module have been upgraded while the target runs.
func TestKVMUpgraded(t *testing.T) {
	needRoot(t)
	needKVM(t)
	dir := t.TempDir()
	program := copied(t, targetProgram(t), dir+"/qemu-system-test")
	libc := ""
	for _, m := range mapsOf(t, start(t, targetProgram(t)).pid) {
		if isLibc(filepath.Base(m.path)) {
			libc = m.path
		}
	}
	copied(t, libc, dir+"/libc.so.6")
	cmd := exec.Command(program, "kvm")
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+dir)
	g := startCommand(t, cmd)
	for _, name := range []string{"/qemu-system-test", "/libc.so.6"} {
		check.NoError(t, os.Remove(dir+name))
		check.NoError(t, os.WriteFile(dir+name, []byte("a newer version"), 0o755))
	}
	link := dir + "/module.so"
	check.NoError(t, os.Symlink(module(t), link))
	check.NoError(t, Check(g.pid, link))
	if result, err := Load(patience(t), g.pid, link); err != nil || result.Already || result.Attempts < 1 || result.Stopped <= 0 {
		t.Fatalf("%+v, %v", result, err)
	}
	if _, ok, err := Loaded(g.pid); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if result, err := Load(patience(t), g.pid, link); err != nil || result != (Result{Already: true}) {
		t.Fatalf("%+v, %v", result, err)
	}
	g.ask()
}

func mapsOf(t *testing.T, pid int) []mapping {
	t.Helper()
	maps := check.Value(readMaps(pid))(t)
	return maps
}
