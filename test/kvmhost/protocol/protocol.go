// Package protocol is what package kvmhost and process 1 of the emulated host say to each other: JSON values over the
// port Control, in turn a Job and Signals to the host, Progress from it.
package protocol

// The virtio serial ports of the host.
const (
	Control = "ftclock.control"
	Stdin   = "ftclock.stdin"
	Stdout  = "ftclock.stdout"
	Stderr  = "ftclock.stderr"
)

// BeatSeconds is how often a host says that it lives.
const BeatSeconds = 5

// RootTag is the 9p mount tag of the machine's file system. Those of Job.Write are this and their index.
const RootTag = "root"

// Job is the command that the host is booted for.
type Job struct {
	Args []string
	Env  []string
	Dir  string
	// Write are the directories that the command shares with the machine, at the same path.
	Write []string
	// Terminal gives the command a terminal, the first virtio console, instead of the three ports.
	Terminal      bool
	Rows, Columns uint16
}

// Signal is sent to the command's process group.
type Signal struct{ Number int }

// Progress is one of these: the host is up, it still lives, the command has ended, the host is broken.
type Progress struct {
	Beat  bool   `json:",omitempty"` // every BeatSeconds while the command runs
	Up    *Up    `json:",omitempty"`
	Exit  *int   `json:",omitempty"` // as a shell gives it
	Error string `json:",omitempty"`
}

// Up says what the host is.
type Up struct {
	Kernel      string
	ClockSource string
	Seconds     float64 // since the kernel began
}
