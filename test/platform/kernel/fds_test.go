// Needed by: the shim's relay, which must send each file descriptor with the
// first byte of the command that it belongs to. It can do so only because the
// kernel ends a read behind the message that carries descriptors, and never
// joins two of those. What came before such a message may well be in front of
// it in the same read: the descriptor belongs to the last command of a read.

package kernel

import (
	"os"
	"testing"

	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

func send(t *testing.T, sock int, data string, fds ...int) {
	t.Helper()
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(sock, []byte(data), rights, nil, 0); err != nil {
		t.Fatal(os.NewSyscallError("sendmsg", err))
	}
}

// receive returns the data and the number of descriptors of one recvmsg.
func receive(t *testing.T, sock, size int) (string, int) {
	t.Helper()
	data, control := make([]byte, size), make([]byte, unix.CmsgSpace(253*4))
	n, cn, flags, _, err := unix.Recvmsg(sock, data, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(os.NewSyscallError("recvmsg", err))
	}
	if flags&unix.MSG_CTRUNC != 0 {
		t.Fatal("descriptors truncated")
	}
	messages := check.Value(unix.ParseSocketControlMessage(control[:cn]))(t)
	count := 0
	for _, m := range messages {
		fds := check.Value(unix.ParseUnixRights(&m))(t)
		for _, fd := range fds {
			unix.Close(fd)
		}
		count += len(fds)
	}
	return string(data[:n]), count
}

func pair(t *testing.T) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(os.NewSyscallError("socketpair", err))
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}

func TestNothingIsGluedBehindDescriptors(t *testing.T) {
	type read struct {
		data string
		fds  int
	}
	for _, c := range []struct {
		name string
		send []read // fds: how many go along
		want []read
	}{
		{"data behind", []read{{"one", 1}, {"two", 0}}, []read{{"one", 1}, {"two", 0}}},
		{"two with descriptors", []read{{"one", 1}, {"two", 2}}, []read{{"one", 1}, {"two", 2}}},
		{"data in front", []read{{"one", 0}, {"two", 1}, {"three", 0}}, []read{{"onetwo", 1}, {"three", 0}}},
	} {
		a, b := pair(t)
		for _, s := range c.send {
			fds := []int{a, a}[:s.fds]
			send(t, a, s.data, fds...)
		}
		for _, want := range c.want {
			if data, fds := receive(t, b, 4096); data != want.data || fds != want.fds {
				t.Errorf("%s: read %q with %d descriptors, not %q with %d", c.name, data, fds, want.data, want.fds)
			}
		}
	}
}

// A reader whose buffer ends within such a message has the descriptors with
// the first part, once.
func TestDescriptorsComeOnceWithTheFirstByte(t *testing.T) {
	a, b := pair(t)
	send(t, a, "command", 0)
	if data, fds := receive(t, b, 3); data != "com" || fds != 1 {
		t.Errorf("first part: %q with %d descriptors", data, fds)
	}
	if data, fds := receive(t, b, 100); data != "mand" || fds != 0 {
		t.Errorf("second part: %q with %d descriptors", data, fds)
	}
}

// SCM_MAX_FD of the kernel's include/net/scm.h: room for 253 is room for all.
func TestAtMost253Descriptors(t *testing.T) {
	a, b := pair(t)
	all := make([]int, 254)
	for i := range all {
		all[i] = a
	}
	if err := unix.Sendmsg(a, []byte("x"), unix.UnixRights(all...), nil, 0); err != unix.EINVAL {
		t.Errorf("sending 254 descriptors: %v", err)
	}
	send(t, a, "x", all[:253]...)
	if _, fds := receive(t, b, 1); fds != 253 {
		t.Errorf("received %d of 253", fds)
	}
}
