package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxStat bounds what is read of /proc/PID/stat, in bytes. It has 52 numbers and a name of 64 bytes at most.
const maxStat = 4 << 10

// maxText bounds what is read of a process's command line or environment, in bytes.
const maxText = 1 << 20

// ReadText reads the beginning, 1 MiB, of a file in /proc that the process itself has a hand in: its command line and its
// environment are as long as it likes, up to all of its memory (PR_SET_MM_MAP of prctl(2), which takes no privilege).
func ReadText(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxText))
}

// Stat is what /proc/PID/stat says of a process: proc_pid_stat(5).
type Stat struct {
	// State is one letter, such as 'R' for running and 'Z' for a zombie.
	State byte
	// Started is when the process began, in clock ticks since boot. It tells one use of a pid from the next.
	Started uint64
}

// ReadStat reads the Stat of process pid. The error wraps os.ErrNotExist, or unix.ESRCH, where there is no such process.
func ReadStat(pid int) (Stat, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Stat{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxStat))
	if err != nil {
		return Stat{}, err
	}
	return parseStat(text)
}

func parseStat(text []byte) (Stat, error) {
	// The second field is the command's name in parentheses. A process chooses it: parentheses, spaces and line ends may be in it.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return Stat{}, errors.New("reading /proc/PID/stat: too few fields")
	}
	started, err := strconv.ParseUint(string(fields[19]), 10, 64) // the 22nd of the line
	if err != nil {
		return Stat{}, fmt.Errorf("reading /proc/PID/stat: %w", err)
	}
	return Stat{State: fields[0][0], Started: started}, nil
}

// ReadPID reads the number of a process from a pid file. It is above 1: nobody means init.
func ReadPID(file string) (int, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s holds no pid", file)
	}
	return pid, nil
}

// OpenProcess gives a descriptor for a process, pidfd_open(2). It is the caller's. Until Ended says that the process has ended, pid
// belongs to no other.
func OpenProcess(pid int) (pidfd int, err error) {
	if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		return -1, fmt.Errorf("watching process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	return pidfd, nil
}

// AwaitEnd returns when the process that pidfd stands for has ended; see pidfd_open(2).
func AwaitEnd(pidfd int) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(fds, -1); n == 1 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// Ended says whether the process that pidfd stands for has ended: its pid may be another's then, whatever is still open.
func Ended(pidfd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return n == 1 && err == nil
}
