package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"ftclock/attach"
	"ftclock/host"
	"ftclock/policy"
	metadata "ftclock/xml-templates"
)

// A QEMU is a process that a file of the host's policy names.
type QEMU struct {
	PID     int
	Started uint64 // in clock ticks since boot
	// Name and UUID are of its guest, as its command line has them; "" where it has none. Name is one printable line.
	Name, UUID string
}

// String words it for the log.
func (q QEMU) String() string {
	if q.Name == "" {
		return fmt.Sprintf("QEMU %d", q.PID)
	}
	return fmt.Sprintf("%s (QEMU %d)", q.Name, q.PID)
}

// Server is how QEMUs are served. Its functions are called by several goroutines.
type Server struct {
	// Left says why a QEMU is to be left alone; "" where it isn't. ours says that it is served as this node serves.
	Left func(q QEMU) (why string, ours bool, err error)
	// Ready says whether it can be served at this moment: attach.Ready.
	Ready func(pid int) error
	// Serve has it served by the policy that file of the host's has.
	Serve func(ctx context.Context, q QEMU, p metadata.Policy, file string) error
}

// How long a QEMU is waited for. Tests are less patient.
type patience struct {
	first, last time.Duration // between two looks, growing
	vm          time.Duration // until it has a virtual machine: one on TCG never has
	idle        time.Duration // until its main thread is idle: hundreds of GiB that are pinned for a device take minutes
	again       time.Duration // between attempts that failed
	attempts    int
}

var patient = patience{
	first: 10 * time.Millisecond, last: 200 * time.Millisecond,
	vm: time.Minute, idle: 15 * time.Minute, again: 5 * time.Second, attempts: 3,
}

// atOnce bounds how many QEMUs are begun to be served at the same time.
const atOnce = 4

// A Node serves the QEMUs of a host.
type Node struct {
	Proc     string // "/proc" but in tests
	Policies string // directory of the host's policy
	Server   Server
	// Info and Warn take a line for the log.
	Info, Warn func(format string, args ...any)

	patience patience
	slots    chan struct{}
	tended   sync.WaitGroup

	looking sync.Mutex // held during a look at a process

	mu    sync.Mutex
	known map[int]uint64    // those that are tended, and when they began
	said  map[string]string // what was said last of a thing that is looked at again and again
}

// Run serves until ctx ends, and closes events. An error says why it can't go on.
func (n *Node) Run(ctx context.Context, events Events) error {
	n.slots = make(chan struct{}, atOnce)
	n.mu.Lock()
	n.known, n.said = map[int]uint64{}, map[string]string{}
	n.mu.Unlock()
	if n.patience == (patience{}) {
		n.patience = patient
	}
	stop := context.AfterFunc(ctx, func() { _ = events.Close() })
	defer func() {
		if stop() {
			_ = events.Close()
		}
	}()
	tending, end := context.WithCancel(ctx)
	defer n.tended.Wait()
	defer end()
	n.scan(tending)
	for {
		pid, err := events.Next()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("waiting for programs that start: %w", err)
		case pid == 0:
			n.scan(tending)
		default:
			n.look(tending, pid, n.readPolicy)
		}
	}
}

// scan looks at all processes.
func (n *Node) scan(ctx context.Context) {
	d, err := os.Open(n.Proc)
	var names []string
	if err == nil {
		names, err = d.Readdirnames(-1)
		d.Close()
	}
	if err != nil {
		n.once("scan", fmt.Sprintf("looking at all processes: %v", err))
		return
	}
	files := sync.OnceValue(n.readPolicy)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			n.look(ctx, pid, files)
		}
	}
}

// readPolicy reads the host's policy, and says once what is wrong with it.
func (n *Node) readPolicy() []policy.File {
	files, err := policy.Read(n.Policies)
	if err != nil {
		n.once(n.Policies, host.ErrorLine(err))
		return nil
	}
	n.once(n.Policies, "")
	for _, f := range files {
		text := ""
		if f.Err != nil {
			text = host.ErrorLine(f.Err)
		}
		n.once(f.Path, text)
	}
	return files
}

// once warns of a thing, unless that was the last that was said of it; "" is nothing to say.
func (n *Node) once(of, text string) {
	n.mu.Lock()
	before := n.said[of]
	n.said[of] = text
	if text == "" {
		delete(n.said, of)
	}
	n.mu.Unlock()
	if text != "" && text != before {
		n.Warn("%s", text)
	}
}

// look looks at a process, and tends it from now on if it is a QEMU that the policy names.
func (n *Node) look(ctx context.Context, pid int, files func() []policy.File) {
	n.looking.Lock()
	defer n.looking.Unlock()
	is, err := attach.IsQEMU(n.Proc, pid)
	if !is || err != nil {
		if errors.Is(err, attach.ErrRefused) {
			n.once("refused", host.ErrorLine(fmt.Errorf("looking at process %d: %w", pid, err)))
		}
		return
	}
	p, err := openProcess(pid)
	if err != nil {
		return // it has ended
	}
	n.mu.Lock()
	known := n.known[pid] == p.started
	n.mu.Unlock()
	if !known {
		if q, _, named := n.named(p, files); named {
			n.mu.Lock()
			n.known[pid] = p.started
			n.mu.Unlock()
			n.tended.Go(func() { n.tend(ctx, p, q) })
			return
		}
	}
	p.close()
}

// named reads what a QEMU calls its guest, and gives the first file that names it.
func (n *Node) named(p *process, files func() []policy.File) (q QEMU, f policy.File, named bool) {
	q = QEMU{PID: p.pid, Started: p.started}
	name, uuid, err := attach.Guest(n.Proc, p.pid)
	if err != nil {
		return q, f, false
	}
	if naming := policy.Naming(files(), metadata.NamedSubject(name, uuid)); len(naming) > 0 {
		f, named = naming[0], true
	}
	const longest = 256 // libvirt's are shorter, as file names are made of them
	q.Name, q.UUID = host.OneLine(name), uuid
	if len(q.Name) > longest {
		q.Name = host.OneLine(q.Name[:longest])
	}
	return q, f, named
}

// tend has a QEMU served, and forgets it when it ends.
func (n *Node) tend(ctx context.Context, p *process, q QEMU) {
	defer func() {
		p.close()
		n.mu.Lock()
		delete(n.known, p.pid)
		n.mu.Unlock()
	}()
	ended, err := n.bring(ctx, p, q)
	switch {
	case ctx.Err() != nil:
		return
	case ended:
		// A QEMU that daemonizes goes on as a child that executes nothing.
		n.scan(ctx)
		return
	case err != nil:
		n.Warn("%s is left alone: %s", q, host.ErrorLine(err))
	}
	p.await(ctx, 0)
}

// bring waits until a QEMU can be served, and has it served. ended says that it has ended before. An error says why it never is.
func (n *Node) bring(ctx context.Context, p *process, q QEMU) (ended bool, err error) {
	began, busy, failed := time.Now(), time.Time{}, 0
	for wait := n.patience.first; ; wait = min(2*wait, n.patience.last) {
		err := n.Server.Ready(q.PID)
		switch {
		case errors.Is(err, attach.ErrNoVM) && time.Since(began) > n.patience.vm,
			errors.Is(err, attach.ErrBusy) && !busy.IsZero() && time.Since(busy) > n.patience.idle:
			return false, fmt.Errorf("it was waited for: %w", err)
		case errors.Is(err, attach.ErrBusy) && busy.IsZero():
			busy = time.Now()
		case err == nil:
			if err = n.serve(ctx, p); err == nil || final(err) {
				return false, err
			}
			if failed++; failed == n.patience.attempts {
				return false, fmt.Errorf("%w (tried %d times)", err, failed)
			}
			wait = n.patience.again
		case final(err):
			return false, err
		}
		if p.await(ctx, wait) {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, nil
		}
	}
}

// final says whether there is no use in trying again. Of a process that is gone its end is about to be seen.
func final(err error) bool {
	for _, later := range []error{attach.ErrNoVM, attach.ErrBusy, attach.ErrTraced, attach.ErrGone} {
		if errors.Is(err, later) {
			return false
		}
	}
	for _, never := range []error{attach.ErrNotQEMU, attach.ErrNoSlot, attach.ErrRefused, attach.ErrShadowStack, errPolicy} {
		if errors.Is(err, never) {
			return true
		}
	}
	return false
}

// errPolicy is the error of a QEMU that a file names which is wrong.
var errPolicy = errors.New("the host's policy for it is wrong")

// serve has a QEMU served that is ready. What names it is read once more: it may have executed itself anew.
func (n *Node) serve(ctx context.Context, p *process) error {
	select {
	case n.slots <- struct{}{}:
		defer func() { <-n.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	q, file, named := n.named(p, n.readPolicy)
	switch {
	case !named:
		n.Info("%s isn't named any more", q)
		return nil
	case file.Err != nil:
		return fmt.Errorf("%w: %w", errPolicy, file.Err)
	}
	why, ours, err := n.Server.Left(q)
	switch {
	case err != nil:
		return err
	case ours:
		n.Info("%s is served already", q)
		return nil
	case why != "":
		n.Info("%s is left alone: %s", q, why)
		return nil
	}
	if err := n.Server.Serve(ctx, q, file.Policy, file.Path); err != nil {
		return err
	}
	n.Info("%s is served from now on, by %s", q, host.OneLine(file.Path))
	return nil
}
