package shim

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/relay"
)

// newPage is a page as the module makes it, without a module.
func newPage(t testing.TB, minor uint32) (*os.File, *clockpage.Page) {
	t.Helper()
	fd, err := unix.MemfdCreate("ftclock-page", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "page")
	t.Cleanup(func() { f.Close() })
	head, err := binary.Append(nil, binary.LittleEndian, clockpage.Head{Magic: clockpage.Magic, Major: clockpage.Major, Minor: minor,
		Size: clockpage.Size, RingLen: clockpage.RingLen, RecordSize: clockpage.RecordSize, PID: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(clockpage.Size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(head, 0); err != nil {
		t.Fatal(err)
	}
	page, err := clockpage.Map(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = page.Close() })
	return f, page
}

// TestAnyPageIsRead has somebody write anything into a page while its domain orders, compares and tells its status.
func TestAnyPageIsRead(t *testing.T) {
	f, page := newPage(t, clockpage.Minor)
	d := testDomain(t, byDefault)
	d.resume(page, true)
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() { // through the file: what another process does to our mapping
		random := rand.New(rand.NewPCG(7, 7))
		b := make([]byte, 8)
		for {
			select {
			case <-stop:
				return
			default:
			}
			value := random.Uint64()
			switch random.IntN(4) {
			case 0:
				value = 1
			case 1:
				value = random.Uint64N(300)
			}
			binary.LittleEndian.PutUint64(b, value)
			_, _ = f.WriteAt(b, random.Int64N(clockpage.Size/8)*8)
		}
	})
	for i := range 3000 {
		id := fmt.Sprint(`"`, i, `"`)
		d.Command(relay.Message{Execute: "stop"})
		d.FromQEMU(relay.Message{Event: "STOP"})
		d.Cont(relay.Message{Execute: "cont", ID: id})
		d.FromQEMU(relay.Message{Event: "RESUME"})
		d.FromQEMU(relay.Message{Answer: i%7 != 0, Failure: i%7 == 0, ID: id})
		var s control.Status
		d.status(&s, 256)
		if len(s.Records) > clockpage.RingLen || len(s.Warnings) > maxWarnings {
			t.Fatalf("%d records, %d warnings", len(s.Records), len(s.Warnings))
		}
		// An answer has to be one that a client takes.
		var answer bytes.Buffer
		if err := control.Send(&answer, control.Answer{Status: &s}); err != nil || answer.Len() >= 1<<20 {
			t.Fatalf("an answer of %d bytes, %v", answer.Len(), err)
		}
	}
	close(stop)
	group.Wait()
}
