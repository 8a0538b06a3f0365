package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain is also the program that the tests keep: a worker that does what it is told on the descriptor "orders".
func TestMain(m *testing.M) {
	part := ""
	if len(os.Args) > 1 {
		part = os.Args[1]
	}
	log := func(what string) { fmt.Fprintln(os.Stderr, what) }
	switch part {
	case Flag:
		if err := Keep(log); err != nil {
			log(err.Error())
			os.Exit(1)
		}
	case "-worker":
		work(log)
	case "-version":
		fmt.Println("a test")
	default:
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			log(err.Error())
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
}

// work answers orders, each a packet, until it is told "done".
func work(log func(string)) {
	s, err := Open(log)
	if err != nil {
		log(err.Error())
		os.Exit(1)
	}
	orders, _ := s.Get("orders")
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, syscall.SIGTERM)
	go func() {
		<-terms
		_, _ = unix.Write(orders, []byte("term"))
	}()
	buf := make([]byte, 256)
	for {
		n, err := unix.Read(orders, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			os.Exit(1)
		}
		order, name, _ := strings.Cut(string(buf[:n]), " ")
		answer := "ok"
		switch order {
		case "put": // two of one name are different files
			fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
			if err == nil {
				s.Put(strings.TrimRight(name, "'"), fd)
			}
		case "drop":
			s.Drop(name)
		case "get":
			answer = "none"
			if fd, ok := s.Get(name); ok {
				answer, _ = os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
			}
		case "pids":
			answer = fmt.Sprint(os.Getpid(), " ", s.KeeperPID())
		case "ready":
			s.Ready()
		case "upgrade":
			if err := s.Upgrade(); err != nil {
				answer = err.Error()
			}
		case "done":
			s.Done()
		}
		_, _ = unix.Write(orders, []byte(answer))
		if order == "done" {
			os.Exit(0)
		}
	}
}
