// Package disk keeps a disk that hangs, as NFS does without its server, from holding up who asks it: a domain's start, a
// command, the exporter.
package disk

import (
	"context"
	"fmt"
	"time"
)

// wait is how long a disk is waited for.
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
