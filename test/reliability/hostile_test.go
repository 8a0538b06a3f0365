package reliability

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAWorkersMemoryIsBounded has a QEMU that a guest has taken over say the worst, and looks at the worker's memory.
func TestAWorkersMemoryIsBounded(t *testing.T) {
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
	}
	// Messages with descriptors that nobody asked for.
	f, err := unix.MemfdCreate("unasked", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(f)
	all := make([]int, 253)
	for i := range all {
		all[i] = f
	}
	for range 50 {
		if _, _, err := p.qemu.WriteMsgUnix([]byte("{}\n"), unix.UnixRights(all...), nil); err != nil {
			t.Fatal(err)
		}
		if _, err := bytesUntil(p.client, '\n'); err != nil {
			t.Fatal(err)
		}
	}
	now := p.whole()
	if now.Shim != s.Shim {
		t.Errorf("the worker died\n%s", p.logText())
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Shim))
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	peak, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil || peak > 40<<10 {
		t.Errorf("the worker took %d KiB at most (%v)", peak, err)
	}
	fmt.Printf("hostile: the worker took %.1f MiB at most\n", float64(peak)/1024)
	p.qemu.Close()
	p.endProcess()
	if _, err := io.ReadAll(p.client); err != nil {
		t.Error(err)
	}
	p.gone()
}
