package main

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"ftclock/spawn"
)

// logTo is where log lines go: to the journal as text for people, with its priorities, to any other file as JSON.
func logTo(f *os.File) io.Writer {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || os.Getenv(spawn.JournalStream) != fmt.Sprintf("%d:%d", st.Dev, st.Ino) {
		return f
	}
	j := &journal{fd: int(f.Fd())}
	j.console = zerolog.ConsoleWriter{Out: &j.line, NoColor: true,
		PartsOrder: []string{zerolog.MessageFieldName}, FieldsExclude: []string{zerolog.TimestampFieldName, zerolog.LevelFieldName}}
	return zerolog.SyncWriter(j)
}

// journal writes to journald's stream. A journald that doesn't read, or is gone at shutdown, costs lines, never a wait
// and never a signal: a monitor is carried here.
type journal struct {
	fd      int
	line    bytes.Buffer
	console zerolog.ConsoleWriter
}

func (j *journal) Write(p []byte) (int, error) { return j.WriteLevel(zerolog.NoLevel, p) }

// WriteLevel puts the priority before the line: sd-daemon(3).
func (j *journal) WriteLevel(level zerolog.Level, p []byte) (int, error) {
	priority := 6
	switch level {
	case zerolog.DebugLevel, zerolog.TraceLevel:
		priority = 7
	case zerolog.WarnLevel:
		priority = 4
	case zerolog.ErrorLevel, zerolog.FatalLevel, zerolog.PanicLevel:
		priority = 3
	}
	j.line.Reset()
	fmt.Fprintf(&j.line, "<%d>", priority)
	if _, err := j.console.Write(p); err != nil {
		j.line.Write(p) // what isn't a log line, of the flag package's
	}
	_, _ = unix.SendmsgN(j.fd, j.line.Bytes(), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return len(p), nil
}
