// Command walltime is for the tests of two hosts, each of which has a clock of its own:
//
//	walltime serve            answers whoever asks what this host's CLOCK_REALTIME reads
//	walltime ask HOST         prints how far that host's clock is ahead of this one's, and within what, in ns
//	walltime set AHEAD BOUND  sets this host's clock ahead by that, in ns, and tells the kernel that it is right to within BOUND,
//	                          in us, as an NTP client does; a BOUND of 0 tells it that nobody keeps the clock
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const port = "1123"

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	err := errors.New("usage: walltime serve | ask HOST | set AHEAD BOUND")
	switch {
	case len(args) == 1 && args[0] == "serve":
		err = serve()
	case len(args) == 2 && args[0] == "ask":
		err = ask(args[1])
	case len(args) == 3 && args[0] == "set":
		err = set(args[1], args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "walltime: error:", err)
		return 1
	}
	return 0
}

func serve() error {
	conn, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		return err
	}
	var question, answer [8]byte
	for {
		_, from, err := conn.ReadFrom(question[:])
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint64(answer[:], uint64(time.Now().UnixNano()))
		if _, err := conn.WriteTo(answer[:], from); err != nil {
			return err
		}
	}
}

// ask takes the best of many answers: the other clock was read at some time within the round trip.
func ask(host string) error {
	conn, err := net.Dial("udp", net.JoinHostPort(host, port))
	if err != nil {
		return err
	}
	defer conn.Close()
	var ahead, within int64 = 0, math.MaxInt64
	for range 300 {
		var answer [8]byte
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		before := time.Now().UnixNano()
		_, err = conn.Write(answer[:])
		if err == nil {
			_, err = conn.Read(answer[:])
		}
		after := time.Now().UnixNano()
		if half := (after - before + 1) / 2; err == nil && half < within {
			ahead, within = int64(binary.BigEndian.Uint64(answer[:]))-before-half, half
		}
	}
	if within == math.MaxInt64 {
		return fmt.Errorf("no answer from %s: %w", host, err)
	}
	fmt.Println(ahead, within)
	return nil
}

func set(ahead, bound string) error {
	by, err := strconv.ParseInt(ahead, 10, 64)
	if err != nil {
		return err
	}
	us, err := strconv.ParseInt(bound, 10, 64)
	if err != nil {
		return err
	}
	fraction := (by%1e9 + 1e9) % 1e9 // which adjtimex(2) wants to be positive
	step := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: (by - fraction) / 1e9, Usec: fraction}}
	if _, err := unix.Adjtimex(&step); err != nil {
		return fmt.Errorf("setting the clock: %w", os.NewSyscallError("adjtimex", err))
	}
	kept := unix.Timex{Modes: unix.ADJ_STATUS | unix.ADJ_MAXERROR, Maxerror: us}
	if us == 0 {
		kept = unix.Timex{Modes: unix.ADJ_STATUS, Status: unix.STA_UNSYNC}
	}
	if _, err := unix.Adjtimex(&kept); err != nil {
		return fmt.Errorf("telling the kernel how good the clock is: %w", os.NewSyscallError("adjtimex", err))
	}
	return nil
}
