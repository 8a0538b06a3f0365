package reliability

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ftclock/test/check"

	"golang.org/x/sys/unix"
)

// TestAHostileQEMU has a QEMU that a guest has taken over say the worst, and looks at the pair's memory, and at the domain
// beside it, which notices nothing.
func TestAHostileQEMU(t *testing.T) {
	beside := startPair(t)
	beside.settled()
	pairBeside := beside.whole()
	trips := beside.roundTrips()
	p := startPair(t)
	p.settled()
	s := p.killWorker(p.whole()) // the first has read the symbols of what it took for QEMU
	const million = 1_000_000
	worst := []struct {
		head, body string
		times      int
	}{
		{`{"event": "`, strings.Repeat("x", 1<<20), 64},
		{`{"`, strings.Repeat(`\u0061`, 100_000), 10},
		{`{"id": `, strings.Repeat("1", 1<<20), 8},
		{"", strings.Repeat("[", million), 1},
		{"", strings.Repeat(`{"a":[`, million), 1},
		{"", strings.Repeat(`{"event": "STOP"}{"event": "RESUME"}`+"\r\n", 1000), 500},
		{"", strings.Repeat("{\"event\": \"\xff\xfe\xc0\"}\n", 1000), 50},
		{"", strings.Repeat("\x00", 1<<20), 4},
	}
	for i, w := range worst {
		before := trips.done.Load()
		end := fmt.Sprintf("}\n{\"number\": %d}\n", i)
		want := len(w.head) + w.times*len(w.body) + len(end)
		var group sync.WaitGroup
		group.Go(func() {
			_, err := io.WriteString(p.qemu, w.head)
			for range w.times {
				if err == nil {
					_, err = io.WriteString(p.qemu, w.body)
				}
			}
			if err == nil {
				_, err = io.WriteString(p.qemu, end)
			}
			if err != nil {
				t.Error(err)
			}
		})
		buf := make([]byte, 256<<10)
		var tail []byte
		for got := 0; got < want; {
			n, err := p.client.Read(buf[:min(len(buf), want-got)])
			if err != nil {
				t.Fatalf("case %d, after %d bytes of %d: %v\n%s", i, got, want, err, p.logText())
			}
			got += n
			tail = append(tail, buf[:n]...)
			tail = tail[max(0, len(tail)-len(end)):]
		}
		group.Wait()
		if string(tail) != end {
			t.Fatalf("case %d ends with %q", i, tail)
		}
		eventually(t, "another round trip beside it", func() bool { return trips.done.Load() > before })
	}
	// Messages with descriptors that nobody asked for.
	f := check.Value(unix.MemfdCreate("unasked", unix.MFD_CLOEXEC))(t)
	defer unix.Close(f)
	all := make([]int, 253)
	for i := range all {
		all[i] = f
	}
	for range 50 {
		if _, _, err := p.qemu.WriteMsgUnix([]byte("{}\n"), unix.UnixRights(all...), nil); err != nil {
			t.Fatal(err)
		}
		check.Value(bytesUntil(p.client, '\n'))(t)
	}
	now := p.whole()
	if now.Shim != s.Shim {
		t.Errorf("the worker died\n%s", p.logText())
	}
	for name, pid := range map[string]int{"worker": now.Shim, "keeper": now.Keeper} {
		peak := peakKiB(t, pid)
		if peak > 40<<10 {
			t.Errorf("the %s took %d KiB at most", name, peak)
		}
		fmt.Printf("hostile: the %s took %.1f MiB at most\n", name, float64(peak)/1024)
	}
	trips.end()
	if s := beside.whole(); s.Shim != pairBeside.Shim || s.Keeper != pairBeside.Keeper || s.Workers != pairBeside.Workers {
		t.Errorf("the pair beside it was %+v, and is %+v\n%s", pairBeside, s, beside.logText())
	}
	fmt.Printf("hostile: %d round trips through the pair beside it; lost 0, failed 0\n", trips.done.Load())
	p.qemu.Close()
	p.endProcess()
	if _, err := io.ReadAll(p.client); err != nil {
		t.Error(err)
	}
	p.gone()
}

// roundTrips are numbered commands and their answers, one at a time.
type roundTrips struct {
	done  atomic.Uint64
	stop  chan struct{}
	group sync.WaitGroup
}

// roundTrips begins to send commands through the pair, and to answer them. One that is lost, doubled or changed fails the test.
func (p *pair) roundTrips() *roundTrips {
	r := &roundTrips{stop: make(chan struct{})}
	commands, answers := bufio.NewReader(p.qemu), bufio.NewReader(p.client)
	// pass sends a line from one side and sees that the same comes out on the other.
	pass := func(from io.Writer, to *bufio.Reader, line string) bool {
		_, err := io.WriteString(from, line)
		got := ""
		if err == nil {
			got, err = to.ReadString('\n')
		}
		if err != nil || got != line {
			p.t.Errorf("beside, after %d round trips: %q became %q: %v", r.done.Load(), line, got, err)
		}
		return err == nil && got == line
	}
	r.group.Go(func() {
		for n := uint64(1); ; n++ {
			select {
			case <-r.stop:
				return
			default:
			}
			if !pass(p.client, commands, fmt.Sprintf(`{"execute":"query-status","id":"libvirt-%d"}`+"\r\n", n)) ||
				!pass(p.qemu, answers, fmt.Sprintf(`{"return": {"running": true}, "id": "libvirt-%d"}`+"\r\n", n)) {
				return
			}
			r.done.Store(n)
		}
	})
	return r
}

func (r *roundTrips) end() {
	close(r.stop)
	r.group.Wait()
}

// peakKiB is the most memory that a process has had, in KiB (VmHWM in proc_pid_status(5)).
func peakKiB(t *testing.T, pid int) int {
	t.Helper()
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, found := strings.Cut(string(status), "VmHWM:")
	if !found {
		t.Fatalf("process %d is gone", pid)
	}
	peak := check.Value(strconv.Atoi(strings.Fields(rest)[0]))(t)
	return peak
}
