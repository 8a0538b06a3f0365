package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ftclock/cmd/ftclock/internal/fakeshim"
	"ftclock/cmd/ftclock/internal/status"
	"ftclock/control"
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

// Who starts a QEMU in a container may name it as he likes: a domain of libvirt's is found all the same, by name and by UUID.
func TestNamesThatAreTaken(t *testing.T) {
	const other = "pid-4711-99"
	at := status.Dirs{Shims: t.TempDir()}
	infos := []control.Info{{Name: "web1", UUID: fakeshim.UUID}, {Name: "web1", UUID: other}, {Name: fakeshim.UUID, UUID: "pid-4712-99"}, {Name: "4711", UUID: "pid-4713-99"},
		{Name: "twice", UUID: "pid-4714-99"}, {Name: "twice", UUID: "pid-4715-99"}}
	var entries []status.Entry
	for _, i := range infos {
		if _, err := fakeshim.MakeDir(at.Shims, i); err != nil {
			t.Fatal(err)
		}
		entries = append(entries, status.Entry{Status: control.Status{Name: i.Name, UUID: i.UUID}})
	}
	slices.SortFunc(entries, func(a, b status.Entry) int { return strings.Compare(a.Name+a.UUID, b.Name+b.UUID) }) // as status.Entries does
	for name, want := range map[string]string{"web1": fakeshim.UUID, fakeshim.UUID: fakeshim.UUID, "4711": other, other: other, "twice": ""} {
		if i, err := servedDomain(at, name); i.UUID != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", name, i.UUID, err)
		}
	}
	known := map[string]status.Known{fakeshim.UUID: {Name: "web1", UUID: fakeshim.UUID, ID: "4711"}}
	for _, name := range []string{"web1", fakeshim.UUID, strings.ToUpper(fakeshim.UUID), "4711"} {
		if got, err := (&statusCmd{Domain: name}).pick(entries, known); err != nil || len(got) != 1 || got[0].UUID != fakeshim.UUID {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
