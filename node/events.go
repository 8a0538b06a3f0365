package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Events tell when to look at which process.
type Events interface {
	// Next waits for the next program that is executed and gives its process. 0 is all of them: some word may be lost.
	Next() (pid int, err error)
	// Close ends a Next that waits, with an error.
	Close() error
}

// every is where the kernel tells nothing: a look at all processes, again and again.
type every struct {
	ticks *time.Ticker
	ended context.Context
	end   context.CancelFunc
}

// Every gives the word to look at all processes once in each interval.
func Every(interval time.Duration) Events {
	e := &every{ticks: time.NewTicker(interval)}
	e.ended, e.end = context.WithCancel(context.Background())
	return e
}

func (e *every) Next() (int, error) {
	select {
	case <-e.ticks.C:
		return 0, nil
	case <-e.ended.Done():
		return 0, os.ErrClosed
	}
}

func (e *every) Close() error {
	e.ticks.Stop()
	e.end()
	return nil
}

// What the kernel sends: struct nlmsghdr of linux/netlink.h, struct cn_msg of linux/connector.h and struct proc_event of
// linux/cn_proc.h, each in the machine's byte order.
const (
	cnProc = 1 // CN_IDX_PROC, CN_VAL_PROC: also the multicast group

	listen, ignore = 1, 2 // enum proc_cn_mcast_op

	eventNone = 0 // the answer to listen
	eventExec = 2

	offIdx, offVal, offAck, offLen = 16, 20, 28, 32
	offWhat                        = 36
	offErr, offProcess             = 52, 56
	eventSize                      = 60

	answerWait = time.Second // it comes before sendto returns
	// socketRoom is for the events of some seconds of a host that starts thousands of programs a second, in bytes.
	socketRoom = 4 << 20
)

type connector struct {
	file *os.File
	id   uint32 // of our request: the answer acknowledges the number behind it, and has a sequence number of the kernel's
}

// Connector has the kernel tell of each execve of the host. It takes CAP_NET_ADMIN in the initial user namespace, and the initial
// pid and network namespaces.
func Connector() (Events, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("opening the kernel's process events: %w", os.NewSyscallError("socket", err))
	}
	c := &connector{file: os.NewFile(uintptr(fd), "process events"), id: uint32(os.Getpid())}
	if err := c.begin(fd); err != nil {
		c.file.Close()
		return nil, fmt.Errorf("opening the kernel's process events: %w", err)
	}
	return c, nil
}

func (c *connector) begin(fd int) error {
	if err := onlyExec(fd); err != nil {
		return err
	}
	// More than the limit is for CAP_NET_ADMIN, and not needed to begin with.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketRoom)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnProc}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := c.send(listen); err != nil {
		return err
	}
	if err := c.file.SetReadDeadline(time.Now().Add(answerWait)); err != nil {
		return err
	}
	for {
		e, err := c.read()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errors.New("the kernel doesn't answer: is this process in the initial user and pid namespaces?")
		case err != nil && !errors.Is(err, unix.ENOBUFS):
			return err
		case e.what == eventNone && e.ack == c.id+1 && e.err != 0:
			return unix.Errno(e.err)
		case e.what == eventNone && e.ack == c.id+1:
			return c.file.SetReadDeadline(time.Time{})
		}
	}
}

// onlyExec has the kernel put nothing else into the socket: of forks and exits there are many more.
func onlyExec(fd int) error {
	// A filter loads words as from the network.
	network := func(what uint32) uint32 {
		return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, what))
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offWhat},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: network(eventExec), Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: network(eventNone), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return os.NewSyscallError("setsockopt", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program))
}

func (c *connector) send(op uint32) error {
	message := make([]byte, offWhat+4)
	native := binary.NativeEndian
	native.PutUint32(message, uint32(len(message)))
	native.PutUint16(message[4:], unix.NLMSG_DONE)
	native.PutUint32(message[offIdx:], cnProc)
	native.PutUint32(message[offVal:], cnProc)
	native.PutUint32(message[offAck:], c.id)
	native.PutUint16(message[offLen:], 4)
	native.PutUint32(message[offWhat:], op)
	_, err := c.file.Write(message)
	return err
}

// event is what is used of one.
type event struct {
	what, ack, err uint32
	pid            int
}

func (c *connector) read() (event, error) {
	buffer := make([]byte, 256)
	n, err := c.file.Read(buffer)
	if err != nil {
		return event{}, err
	}
	return parseEvent(buffer[:n]), nil
}

// parseEvent reads a message of the kernel's. What is none is an event that nobody waits for.
func parseEvent(message []byte) event {
	native := binary.NativeEndian
	const other = 1
	if len(message) < eventSize-4 || native.Uint32(message[offIdx:]) != cnProc || native.Uint32(message[offVal:]) != cnProc {
		return event{what: other}
	}
	e := event{what: native.Uint32(message[offWhat:]), ack: native.Uint32(message[offAck:])}
	switch {
	case e.what == eventNone:
		e.err = native.Uint32(message[offErr:])
	case e.what == eventExec && len(message) >= eventSize:
		e.pid = int(int32(native.Uint32(message[offProcess:])))
	default:
		e.what = other
	}
	return e
}

func (c *connector) Next() (int, error) {
	for {
		e, err := c.read()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			return 0, nil // it had no room for some
		case err != nil:
			return 0, err
		case e.what == eventExec && e.pid > 0:
			return e.pid, nil
		}
	}
}

func (c *connector) Close() error {
	_ = c.send(ignore) // before Linux 6.6 it counts its listeners by this
	return c.file.Close()
}
