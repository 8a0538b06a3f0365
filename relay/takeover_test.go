package relay

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAWorkerGoesOnFromAnyState begins relays with everything that a worker which died may have left: what the pipe
// holds, the words, and what is still to be read.
func TestAWorkerGoesOnFromAnyState(t *testing.T) {
	for _, c := range []struct {
		name       string
		carry, mid uint32
		pipe, rest string // left in the pipe; still in the source
		arrives    string
		sees       string
	}{
		{"between two messages", carryNone, 0, "", `{"execute":"stop"}` + "\n", `{"execute":"stop"}` + "\n", "[command stop]"},
		{"with bytes under way", carryNone, 1, `{"a":"`, `{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n",
			`{"a":"{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"with a message under way", carryNone, 0, `{"execute":"cont"}` + "\n", `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"with a message under way that wasn't seen yet", carryNone, 1, `{"execute":"cont"}`, "\r\n" + `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}` + "\r\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"within a message", carryNone, 1, "", `{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n",
			`{"execute":"cont"}"}` + "\n" + `{"execute":"stop"}` + "\n", "[command stop]"},
		{"a carrier sent, not taken away", carrySent, 1, "", "{}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier sent and taken away", carrySent, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done, in the pipe", carryDone, 1, "{", "}\n{}\n", "}\n{}\n", "[]"},
		{"a carrier done", carryDone, 1, "", "}\n{}\n", "}\n{}\n", "[]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &seen{}
			client, qemu, r := unstarted(t, o)
			*r.directions[Up].Mid, *r.directions[Up].Carry = c.mid, c.carry
			if _, err := unix.Write(r.directions[Up].W, []byte(c.pipe)); err != nil {
				t.Fatal(err)
			}
			send(t, client, c.rest)
			end := running(t, client, qemu, r)
			_ = client.CloseWrite()
			expectAll(t, qemu, c.arrives)
			end()
			if log := fmt.Sprint(o.log); log != c.sees {
				t.Errorf("sees %s, not %s", log, c.sees)
			}
			if *r.directions[Up].Carry != carryNone {
				t.Error("the word is left set")
			}
		})
	}
}

// TestTheWordMidIsOfWhatIsBehindThePipe looks at what a worker leaves that dies while QEMU doesn't read: the pipe, which the next one
// sends first, has a whole message, and a recogniser can begin behind it.
func TestTheWordMidIsOfWhatIsBehindThePipe(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{})
	end := running(t, client, qemu, r)
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	waiting := func() (n int) { // what the relay hasn't taken yet
		_ = raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		return n
	}
	message := `{"a":"` + strings.Repeat("x", 1000) + `"}`
	// A relay that only waits for a processor looks the same, but not for long.
	const looks = 20
	deadline := time.Now().Add(2 * time.Minute)
	for alike := 0; alike < looks; {
		if waiting() == 0 {
			alike = 0
			_, err = client.Write([]byte(message))
		}
		if err != nil {
			t.Fatal(err)
		}
		left, pipeErr := unix.IoctlGetInt(r.directions[Up].R, unix.TIOCINQ)
		mid := atomic.LoadUint32(r.directions[Up].Mid)
		if left > 0 && waiting() > 0 && mid == 0 {
			alike++
			time.Sleep(10 * time.Millisecond)
			continue
		}
		alike = 0
		if pipeErr != nil || time.Now().After(deadline) {
			t.Fatalf("the pipe has %d bytes (%v), %d aren't taken, and the word is %d", left, pipeErr, waiting(), mid)
		}
	}
	end()
}

// TestTheWordMidIsSetWithinAMessage looks at what a worker that dies now would leave.
func TestTheWordMidIsSetWithinAMessage(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{})
	end := running(t, client, qemu, r)
	for _, step := range []struct {
		text string
		mid  uint32
	}{{`{"execute":`, 1}, {`"stop"}`, 0}, {"\r", 0}, {"\n{", 1}, {"}\n", 0}} {
		send(t, client, step.text)
		expect(t, qemu, step.text)
		eventually(t, fmt.Sprintf("behind %q the word is %d", step.text, step.mid), func() bool { return atomic.LoadUint32(r.directions[Up].Mid) == step.mid })
	}
	end()
}

// TestARefusalComesBetweenMessages has the last worker die within a message of QEMU's, and the next one refuse a cont: whatever of
// that message is still to come goes first.
func TestARefusalComesBetweenMessages(t *testing.T) {
	client, qemu, r := unstarted(t, &seen{gate: true, refusal: "no"})
	*r.directions[Down].Mid = 1
	if _, err := unix.Write(r.directions[Down].W, []byte(`{"return": `)); err != nil {
		t.Fatal(err)
	}
	send(t, client, `{"execute":"cont","id":1}`+"\n")
	end := running(t, client, qemu, r)
	time.Sleep(100 * time.Millisecond) // enough for a refusal that doesn't wait
	send(t, qemu, "{}}\r\n")
	expect(t, client, `{"return": {}}`+"\r\n"+`{"id": 1, "error": {"class": "GenericError", "desc": "no"}}`+"\r\n")
	end()
}
