// Package protocol is what package kvmhost and process 1 of the emulated host say to each other: JSON values over the
// port Control, in turn a Job and Signals or Calls to the host, Progress from it.
package protocol

import "syscall"

// The virtio serial ports of the host.
const (
	Control = "ftclock.control"
	Stdin   = "ftclock.stdin"
	Stdout  = "ftclock.stdout"
	Stderr  = "ftclock.stderr"
)

// BeatSeconds is how often a host is asked whether it lives, by a Signal or Call that is empty. That comes from outside, as an
// interrupt: an emulated processor may lose the one of its own timer, and then waits for the next, whatever it is from.
const BeatSeconds = 1

// RootTag is the 9p mount tag of the host's root, which is the machine's or an image. Those of Job.Write are this and their index,
// those of Job.Read follow.
const RootTag = "root"

// Disk is where a host with a disk of its own has it.
const Disk = "/dev/vda"

// Job is the command that the host is booted for.
type Job struct {
	Args []string
	Env  []string
	Dir  string
	// Write are the directories that the command shares with the machine, at the same path.
	Write []string
	// Read are directories of the machine's that the host sees, by their places in it.
	Read []string
	// Init is the program that becomes process 1. The host then runs Calls, and no command of its own.
	Init string
	// Address is that of a host with a network, "" of one without.
	Address string
	// Disk says that what the host writes goes to its disk, not to memory.
	Disk bool
	// OnDisk says that all of the host is on its disk.
	OnDisk bool
	// Terminal gives the command a terminal, the first virtio console, instead of the three ports.
	Terminal      bool
	Rows, Columns uint16
}

// Signal is sent to the command's process group. 0 asks for a beat.
type Signal struct{ Number int }

// Call is a command for a host whose process 1 is its own. One without Args asks for a beat.
type Call struct {
	ID    int
	Args  []string
	Input []byte
}

// Result is what came of a Call.
type Result struct {
	ID     int
	Output []byte // both streams
	Code   int    // as a shell gives it
	Error  string // "" where it began
}

// ExitCode is the exit code that a shell would give.
func ExitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// Progress is one of these: the host is up, it still lives, the command or a call has ended, the host is broken.
type Progress struct {
	Beat  bool   `json:",omitempty"` // every processor ran programs since a beat was asked for
	Up    *Up    `json:",omitempty"`
	Exit  *int   `json:",omitempty"` // as a shell gives it
	Error string `json:",omitempty"`

	Result *Result `json:",omitempty"`
}

// Up says what the host is.
type Up struct {
	Kernel      string
	ClockSource string
	Seconds     float64 // since the kernel began
}
