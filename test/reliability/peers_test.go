package reliability

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ftclock/control"
	"ftclock/test/check"
)

// A direction is one half of the conversation.
type direction struct {
	name     string
	speaker  *speaker
	listener *listener
	failed   chan error // what ended the listener
}

// TestPeersNoticeNothing kills worker and keeper, and upgrades them, while a client and a QEMU talk through them as
// fast as they can.
func TestPeersNoticeNothing(t *testing.T) {
	workers := check.Count(t, "FTCLOCK_WORKER_KILLS", 40)
	keepers := check.Count(t, "FTCLOCK_KEEPER_KILLS", 10)
	upgrades := check.Count(t, "FTCLOCK_UPGRADES", 5)
	random, seed := check.Random(t)

	p := startPair(t)
	p.settled()
	before := p.killWorker(p.killKeeper(p.whole())) // neither is the first of its kind: the first has a little more open
	p.relays()
	workerFDs, keeperFDs := openFDs(before.Shim), openFDs(before.Keeper)

	up := &direction{"client to QEMU", newSpeaker(p.client, seed+1, `"execute":"cont"`, `"execute":"stop"`, `"execute":"query-status"`, ""),
		newListener(p.qemu), make(chan error, 1)}
	down := &direction{"QEMU to client", newSpeaker(p.qemu, seed+2, `"event":"STOP"`, `"event":"RESUME"`, `"return":{}`, ""),
		newListener(p.client), make(chan error, 1)}
	directions := []*direction{up, down}
	var broken atomic.Bool
	for _, d := range directions {
		go func() {
			err := d.listener.listen()
			broken.Store(true)
			d.failed <- err
		}()
	}
	stop := make(chan struct{})
	var group sync.WaitGroup
	for _, d := range directions {
		group.Go(func() {
			pace := rand.New(rand.NewPCG(seed, d.speaker.seed))
			lockstep := false
			for left := 0; ; left-- {
				select {
				case <-stop:
					return
				default:
				}
				if left <= 0 {
					lockstep, left = !lockstep, 20+pace.IntN(200)
				}
				if err := d.speaker.say(); err != nil {
					if !broken.Load() {
						t.Errorf("%s: speaking: %v", d.name, err)
					}
					return
				}
				for lockstep && !broken.Load() && d.listener.heard.Load() < d.speaker.sent.Load() {
					time.Sleep(20 * time.Microsecond)
				}
			}
		})
	}

	var deeds []byte
	deeds = append(deeds, bytes.Repeat([]byte("w"), workers)...)
	deeds = append(deeds, bytes.Repeat([]byte("k"), keepers)...)
	deeds = append(deeds, bytes.Repeat([]byte("u"), upgrades)...)
	random.Shuffle(len(deeds), func(i, j int) { deeds[i], deeds[j] = deeds[j], deeds[i] })
	begun := time.Now()
	s := before
	for _, deed := range deeds {
		if broken.Load() {
			break
		}
		if random.IntN(4) > 0 {
			time.Sleep(time.Duration(random.Int64N(int64(30 * time.Millisecond))))
		}
		switch deed {
		case 'w':
			s = p.killWorker(s)
		case 'k':
			s = p.killKeeper(s)
		case 'u':
			s = p.upgrade(s)
		}
	}
	took := time.Since(begun)
	for _, d := range directions { // however few deeds were asked for
		eventually(t, d.name+": 1,000 messages", func() bool { return broken.Load() || d.speaker.sent.Load() >= 1000 })
	}
	close(stop)
	ended := func(d *direction) {
		select {
		case err := <-d.failed:
			t.Fatalf("%s: %v\n%s", d.name, err, p.logText())
		default:
		}
	}
	for _, d := range directions {
		eventually(t, d.name+": the last messages", func() bool {
			ended(d)
			return d.listener.heard.Load() == d.speaker.sent.Load()
		})
	}
	group.Wait()
	for _, d := range directions { // a speaker may have finished one more
		eventually(t, d.name+": the last message", func() bool {
			ended(d)
			return d.listener.heard.Load() == d.speaker.sent.Load()
		})
	}

	// Who started the other holds a pidfd of it: let the same one have done that as before.
	s = p.killWorker(p.killKeeper(s))
	eventually(t, fmt.Sprintf("as few descriptors as before: worker %d, keeper %d", workerFDs, keeperFDs), func() bool {
		return openFDs(s.Shim) <= workerFDs && openFDs(s.Keeper) <= keeperFDs
	})
	eventually(t, "no zombie of the pair's", func() bool { return len(zombies(s.Shim, s.Keeper)) == 0 })

	// QEMU's end is the client's, and the shim's.
	p.qemu.Close()
	p.endProcess()
	for _, d := range directions {
		err := <-d.failed
		if d == down && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the client sees QEMU's end as: %v", err)
		}
	}
	p.gone()
	for _, d := range directions {
		if !bytes.Equal(d.speaker.all.Sum(nil), d.listener.all.Sum(nil)) || d.speaker.fds != d.listener.fds {
			t.Errorf("%s: %d bytes and %d descriptors became %d and %d, or others", d.name, d.speaker.bytes, d.speaker.fds, d.listener.bytes, d.listener.fds)
		}
	}
	fmt.Printf("peers: %d kills of the worker, %d of the keeper, %d upgrades in %.1f s; "+
		"messages %d up, %d down; bytes %d up, %d down; descriptors %d up, %d down; lost 0, doubled 0\n",
		workers, keepers, upgrades, took.Seconds(), up.listener.heard.Load(), down.listener.heard.Load(),
		up.listener.bytes, down.listener.bytes, up.listener.fds, down.listener.fds)
}

// TestPeersAfterAClientThatReconnects has the client leave in mid-message and come again, as a libvirtd that is killed and
// started does, now and then with a kill beside it. QEMU hears the beginning of what was cut and its end, and nothing of the old
// connection comes over the new one.
func TestPeersAfterAClientThatReconnects(t *testing.T) {
	times := check.Count(t, "FTCLOCK_RECONNECTS", 20)
	random, seed := check.Random(t)
	p := startPair(t)
	p.settled()
	s := p.killWorker(p.killKeeper(p.whole()))
	p.relays()
	workerFDs, keeperFDs := openFDs(s.Shim), openFDs(s.Keeper)
	messages, kills := uint64(0), 0
	for i := range uint64(times) {
		// Whoever waits for what was lost isn't to wait for ever.
		check.NoError(t, errors.Join(p.client.SetDeadline(time.Now().Add(patience)), p.qemu.SetDeadline(time.Now().Add(patience))))
		up := &direction{"client to QEMU", newSpeaker(p.client, seed+2*i, `"execute":"query-status"`, `"execute":"stop"`, ""), newListener(p.qemu), make(chan error, 1)}
		down := &direction{"QEMU to client", newSpeaker(p.qemu, seed+2*i+1, `"event":"STOP"`, `"return":{}`, ""), newListener(p.client), make(chan error, 1)}
		for _, d := range []*direction{up, down} {
			go func() { d.failed <- d.listener.listen() }()
		}
		for range 50 {
			for _, d := range []*direction{up, down} {
				if err := d.speaker.say(); err != nil {
					t.Fatalf("connection %d, %s: %v\n%s", i, d.name, err, p.logText())
				}
			}
		}
		for _, d := range []*direction{up, down} {
			eventually(t, d.name+": all messages", func() bool { return d.listener.heard.Load() == d.speaker.sent.Load() || len(d.failed) > 0 })
			if d.listener.heard.Load() != d.speaker.sent.Load() {
				t.Fatalf("connection %d, %s: %v\n%s", i, d.name, <-d.failed, p.logText())
			}
			messages += d.listener.heard.Load()
		}
		// Both are in the middle of a message.
		cut := map[*direction][]byte{}
		for _, d := range []*direction{up, down} {
			b := d.speaker.message(d.speaker.sent.Load()+1, 100+random.IntN(100_000), 0)
			b = b[:1+random.IntN(len(b)-1)]
			check.Value(d.speaker.conn.Write(b))(t)
			cut[d] = b
		}
		if random.IntN(2) == 0 {
			kills++
			if random.IntN(3) == 0 {
				s = p.killKeeper(s)
			} else {
				s = p.killWorker(s)
			}
		}
		p.client.Close()
		if err := <-up.failed; !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("connection %d: QEMU sees the client's end as: %v\n%s", i, err, p.logText())
		}
		if err := <-down.failed; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("connection %d: the client: %v\n%s", i, err, p.logText())
		}
		if !bytes.HasPrefix(cut[up], up.listener.line) || !bytes.HasPrefix(cut[down], down.listener.line) {
			t.Fatalf("connection %d: behind the last message came something else", i)
		}
		p.qemu.Close()
		var err error
		p.client = check.Value(net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(p.dir, control.MonitorSocket), Net: "unix"}))(t)
		check.NoError(t, p.listener.SetDeadline(time.Now().Add(patience)))
		if p.qemu, err = p.listener.AcceptUnix(); err != nil {
			t.Fatalf("connection %d: nobody connects to QEMU again: %v\n%s", i, err, p.logText())
		}
	}
	// The last of its kind may have something open for one that isn't there any more.
	s = p.killWorker(p.killKeeper(p.whole()))
	eventually(t, fmt.Sprintf("as few descriptors as before: worker %d, keeper %d", workerFDs, keeperFDs), func() bool {
		return openFDs(s.Shim) <= workerFDs && openFDs(s.Keeper) <= keeperFDs
	})
	fmt.Printf("peers: the client left in mid-message and came again %d times, with %d kills; %d messages, lost 0, doubled 0\n", times, kills, messages)
	p.client.Close()
	p.qemu.Close()
	p.endProcess()
	p.gone()
}
