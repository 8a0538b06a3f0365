// Package disk keeps a disk that hangs, as NFS does without its server, from holding up a domain's start.
package disk

import (
	"context"
	"fmt"
	"time"
)

// wait is how long a start waits for a disk.
const wait = 3 * time.Second

// InTime gives f's error, or says that the disk that path is on hangs. f must not touch what it leaves to the caller after that.
func InTime(ctx context.Context, path string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s doesn't answer: its disk hangs", path)
	}
}
