package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/disk"
	metadata "ftclock/xml-templates"
)

// claim makes the domain's state directory, and the socket for requests in it.
func (s *shim) claim() (*net.UnixListener, error) {
	listener := kept[*net.UnixListener](s, fdControl, net.FileListener)
	old := listener != nil
	if _, err := os.Lstat(filepath.Join(s.dir, control.SocketName)); err != nil && old { // nobody can reach it any more
		if again, err := s.listen(); err != nil {
			s.Log.Warn().Err(err).Msg("this shim can't be asked any more, it serves all the same; see who removed its directory")
		} else if err := s.keep(fdControl, again); err != nil {
			_ = again.Close()
		} else {
			_ = listener.Close()
			listener = again
		}
	}
	if !old {
		var err error
		if listener, err = s.listen(); err != nil {
			return nil, err
		}
		if err := s.keep(fdControl, listener); err != nil {
			return nil, err
		}
	}
	info, err := json.Marshal(control.Info{Name: s.Name, UUID: s.UUID, Mode: s.mode()})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.dir, control.InfoName), append(info, '\n'), 0o600); err != nil {
		if !old {
			return nil, fmt.Errorf("writing the shim's state: %w", err)
		}
		s.Log.Warn().Err(err).Msg("writing the shim's state; make room in /run") // no reason to give up a monitor that is carried
	}
	return listener, nil
}

func (s *shim) listen() (*net.UnixListener, error) {
	if err := os.MkdirAll(s.State, 0o711); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	// Made now, not when there is something to write: ftclock may have been purged under this shim by then.
	err := disk.InTime(context.Background(), s.LastStops, func() error { return os.MkdirAll(s.LastStops, 0o700) })
	if err != nil {
		s.Log.Warn().Err(err).Msg("no record is kept, and no reading for a restored guest: fix the directory, and start the domain anew")
	}
	path := filepath.Join(s.dir, control.SocketName)
	for end := time.Now().Add(endWait); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if control.NobodyListens(err) {
			break
		}
		if err == nil {
			_ = conn.Close()
		}
		if time.Now().After(end) { // it isn't that of the domain's last life, still writing its record
			return nil, fmt.Errorf("another shim serves domain %s (%s)", s.Name, s.UUID)
		}
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return nil, fmt.Errorf("clearing a dead shim's state: %w", err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		_ = os.RemoveAll(s.dir)
		return nil, fmt.Errorf("listening for requests: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	return listener, nil
}

// serveControl answers requests of the command line.
func (s *shim) serveControl(listener *net.UnixListener) {
	asked := make(chan struct{}, maxRequests)
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors or memory: it may pass
			continue
		}
		select {
		case asked <- struct{}{}:
		default: // the disk of the records hangs, or somebody plays: the monitor's descriptors are worth more
			_ = conn.Close()
			continue
		}
		go func() {
			defer func() { <-asked }()
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			var request control.Request
			if err := control.Receive(conn, &request); err != nil {
				return
			}
			answer := s.answer(request)
			_ = control.Send(conn, answer)
			if request.Do == "quit" && answer.Error == "" {
				s.oneQuit.Do(func() { close(s.quit) })
			}
		}()
	}
}

func (s *shim) answer(r control.Request) control.Answer {
	switch r.Do {
	case "status":
		s.lookAtMetadata(false)
	case "policy":
		var policy *metadata.Policy
		if r.Clock != "" {
			p, err := metadata.ParseElement([]byte(r.Clock))
			if err != nil {
				return control.Answer{Error: err.Error()}
			}
			policy = &p
		}
		s.domain.setPolicy(policy)
	case "anchor":
		a, err := s.domain.readAnchor()
		if err != nil {
			return control.Answer{Error: err.Error()}
		}
		return control.Answer{Anchor: &a}
	case "published":
		s.published.Store(time.Now().UnixNano())
		return control.Answer{}
	case "import":
		if r.Anchor == nil {
			return control.Answer{Error: "there is no anchor in the request"}
		}
		if err := s.domain.importAnchor(*r.Anchor, clockpage.Migrate); err != nil {
			return control.Answer{Error: err.Error()}
		}
	case "quit":
		if s.mode() == control.Relay && s.qemuLives() {
			return control.Answer{Error: "this shim carries the domain's monitor: it ends with the domain"}
		}
		s.domain.setPolicy(nil)
	default:
		return control.Answer{Error: fmt.Sprintf("unknown request %q; known are status, policy, anchor, published, import, quit", r.Do)}
	}
	status := &control.Status{
		Name: s.Name, UUID: s.UUID, Version: s.Version, Mode: s.mode(), Policy: s.Policy,
		Kept: s.domain.recorder.status(),
		Shim: os.Getpid(), Keeper: s.Store.KeeperPID(),
	}
	if at := s.published.Load(); at != 0 {
		status.Published = time.Unix(0, at)
	}
	s.domain.status(status, min(max(r.Records, 0), 256))
	return control.Answer{Status: status}
}
