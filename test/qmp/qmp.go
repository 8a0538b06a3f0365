// Package qmp is a small client of QEMU's machine protocol for tests: one
// command at a time, events are dropped. It is not for a monitor that
// somebody else uses too.
package qmp

import (
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// Conn is a connection to a monitor in command mode.
type Conn struct {
	conn net.Conn
	dec  *json.Decoder
}

type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// Dial connects to the unix socket at path, waits up to timeout for QEMU to
// create it, and negotiates the capabilities.
func Dial(path string, timeout time.Duration) (*Conn, error) {
	var conn net.Conn
	var err error
	for end := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		if conn, err = net.Dial("unix", path); err == nil {
			break
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("dialing monitor: %w", err)
		}
	}
	c := &Conn{conn: conn, dec: json.NewDecoder(conn)}
	var greeting message
	if err := c.dec.Decode(&greeting); err != nil || greeting.Greeting == nil {
		conn.Close()
		return nil, fmt.Errorf("dialing monitor %s: no greeting: %v", path, err)
	}
	if _, err := c.Execute("qmp_capabilities", nil); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// Execute runs one command and returns what it returned. An error of QEMU's
// carries its description.
func (c *Conn) Execute(command string, arguments any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	line, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("executing %s: %w", command, err)
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("executing %s: %w", command, err)
	}
	for {
		var m message
		if err := c.dec.Decode(&m); err != nil {
			return nil, fmt.Errorf("executing %s: %w", command, err)
		}
		switch {
		case m.Event != "":
		case m.Error != nil:
			return nil, fmt.Errorf("executing %s: %s: %s", command, m.Error.Class, m.Error.Desc)
		default:
			return m.Return, nil
		}
	}
}

// Close closes the connection; QEMU keeps running.
func (c *Conn) Close() error { return c.conn.Close() }

// Run executes commands that have no arguments, one after the other.
func (c *Conn) Run(commands ...string) error {
	for _, command := range commands {
		if _, err := c.Execute(command, nil); err != nil {
			return err
		}
	}
	return nil
}

// Pause stops the guest for that long, and has it go on.
func (c *Conn) Pause(length time.Duration) error {
	err := c.Run("stop")
	if err == nil {
		time.Sleep(length)
		err = c.Run("cont")
	}
	return err
}
