package packaging

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Every shell really completes: a person types beginnings and the tabulator, and what arrives at the program are whole words.
// The domain is libvirt's test driver's only one.
func TestCompletions(t *testing.T) {
	ftclock, err := filepath.Abs("../bin/ftclock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(ftclock); err != nil {
		t.Fatal("no bin/ftclock: make build")
	}
	here, err := filepath.Abs("completions")
	if err != nil {
		t.Fatal(err)
	}
	for _, shell := range []struct {
		name  string
		args  []string
		setup string
	}{
		{"bash", []string{"--norc", "--noprofile", "-i"}, "source " + here + "/ftclock.bash"},
		// compinit reads the first line of what is in fpath, as for a package's file.
		{"zsh", []string{"-f", "-i"}, "fpath=(" + here + " $fpath); autoload -U compinit; compinit -u -D"},
		{"fish", []string{"--no-config", "--private", "-i"}, "source " + here + "/ftclock.fish"},
	} {
		t.Run(shell.name, func(t *testing.T) {
			path := need(t, shell.name, shell.name)
			dir := t.TempDir()
			// The program as the shell finds it: it completes as the real one, and else tells what it was given.
			program := "#!/bin/sh\n[ -z \"$COMP_LINE\" ] || exec " + ftclock + "\nprintf '<%s>' \"$@\" >" + dir + "/next && mv " + dir + "/next " + dir + "/given\n"
			if err := os.WriteFile(filepath.Join(dir, "ftclock"), []byte(program), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct{ typed, given string }{
				{"ftclock enab\t --prel\t --ref\tu\t te\t", "<enable><--preload><--reference><utc><test>"},
				{"ftclock stat\t --for\tj\t", "<status><--format><json>"},
				{"ftclock -c test:///default doc\t", "<-c><test:///default><doctor>"},
				{"ftclock attach --checkp\t", "<attach><--checkpoint-limit>"},
			} {
				given := typing(t, dir, path, shell.args, shell.setup, c.typed)
				if given != c.given {
					t.Errorf("%q: the program was given %s, want %s", c.typed, given, c.given)
				}
			}
		})
	}
}

// typing runs a shell on a terminal, has it set up, types a line and gives what the program got.
func typing(t *testing.T, dir, shell string, args []string, setup, line string) string {
	t.Helper()
	_ = os.Remove(filepath.Join(dir, "given"))
	// script(1) gives it a terminal.
	cmd := exec.Command(need(t, "script", "bsdutils"), "-q", "-e", "-c", shell+" "+strings.Join(args, " "), "/dev/null")
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "HOME=" + dir, "HISTFILE=/dev/null", "TERM=vt100", "LC_ALL=C.UTF-8", "PS1=$ ",
		"LIBVIRT_DEFAULT_URI=test:///default"}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	// A shell that is left alone writes into the directory while that is taken away.
	end := func() {
		select {
		case <-ended:
		case <-time.After(2 * time.Minute):
			_ = cmd.Process.Kill()
			<-ended
		}
	}
	defer end()
	// A shell throws away what was typed before it was ready for it.
	ready := filepath.Join(dir, "ready")
	_ = os.Remove(ready)
	waitFor(t, ready, func() { _, _ = io.WriteString(stdin, setup+"; touch "+ready+"\r") })
	for _, part := range strings.SplitAfter(line, "\t") {
		_, _ = io.WriteString(stdin, part)
	}
	given := filepath.Join(dir, "given")
	waitFor(t, given, func() { _, _ = io.WriteString(stdin, "\r") })
	_, _ = io.WriteString(stdin, "exit\r")
	text, err := os.ReadFile(given)
	if err != nil {
		end()
		t.Fatalf("%v\n%s", err, output.String())
	}
	return string(text)
}

// waitFor does something, and again from time to time, until a file is there.
func waitFor(t *testing.T, file string, do func()) {
	t.Helper()
	do()
	for i := 1; i <= 1200; i++ {
		if _, err := os.Stat(file); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
		if i%200 == 0 {
			do()
		}
	}
}
