package main

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// Domains that keep libvirt waiting hold up nobody behind them, and each error is its own domain's.
func TestSideBySide(t *testing.T) {
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("vm%02d", i))
	}
	long := errors.New("a long job")
	release, others := make(chan struct{}), make(chan string, len(names))
	done := make(chan []error, 1)
	go func() {
		done <- sideBySide(names, func(name string) error {
			if name <= "vm01" {
				<-release
				return long
			}
			others <- name
			return nil
		})
	}()
	for range len(names) - 2 {
		select {
		case <-others:
		case <-time.After(time.Minute):
			t.Fatal("two domains with a long job hold up the others")
		}
	}
	close(release)
	for i, err := range <-done {
		if (err != nil) != (i < 2) {
			t.Errorf("%s: %v", names[i], err)
		}
	}
}
