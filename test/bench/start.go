package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"ftclock/control"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"
)

// served tells whether a shim has the module in a domain's QEMU and keeps its clock.
func (b *bench) served(d *privatelibvirt.Domain) (bool, error) {
	status, err := d.Status(0)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return status.State == control.Correcting, nil
}

// start times virsh start of domains with and without metadata, with and without the hook, in turns.
func (b *bench) start() (_ string, err error) {
	const hook = privatelibvirt.HooksDir + "/50-ftclock"
	target, err := os.Readlink(hook)
	if err != nil {
		return "", err
	}
	// libvirt looks into the directory at each call.
	install := func(on bool) error {
		err := os.Remove(hook)
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		if on {
			err = errors.Join(err, os.Symlink(target, hook))
		}
		return err
	}
	defer func() { err = errors.Join(err, install(true)) }()

	domains := map[bool]*privatelibvirt.Domain{}
	for isManaged, metadata := range map[bool]string{false: "", true: managed} {
		d, err := privatelibvirt.Define(b.conn, privatelibvirt.Manage(privatelibvirt.GuestXML(fmt.Sprintf("start-%t", isManaged), b.elf), metadata))
		if err != nil {
			return "", err
		}
		defer func() { _ = d.Remove() }()
		domains[isManaged] = d
	}
	type way struct{ managed, hook bool }
	ways := []way{{false, false}, {false, true}, {true, false}, {true, true}}
	took := make(map[way][]float64)
	began := time.Now()
	for round := range pick(b, 40, 1) + 1 {
		if round > 1 && b.late(began) {
			break
		}
		for _, w := range ways {
			if err := install(w.hook); err != nil {
				return "", err
			}
			begin := time.Now()
			if _, err := privatelibvirt.Virsh("start", domains[w.managed].Name); err != nil {
				return "", err
			}
			d := measure.Micros(time.Since(begin)) / 1e3
			if round > 0 { // the first fills caches
				took[w] = append(took[w], d)
			}
			served, err := b.served(domains[w.managed])
			if err != nil {
				return "", err
			}
			b.check(served == (w.managed && w.hook), "of domains that are managed: %t, with the hook: %t, one is served: %t", w.managed, w.hook, served)
			if err := domains[w.managed].Destroy(); err != nil {
				return "", err
			}
		}
	}

	// The hook on its own, as libvirt calls it, for a domain that isn't managed.
	text, err := domains[false].GetXMLDesc(0)
	if err != nil {
		return "", err
	}
	var alone, nothing []float64
	for range pick(b, 200, 5) {
		for _, program := range []string{target, "/bin/true"} {
			cmd := exec.Command(program, domains[false].Name, "start", "begin", "-")
			cmd.Stdin = strings.NewReader(text)
			begin := time.Now()
			if out, err := cmd.CombinedOutput(); err != nil {
				return "", fmt.Errorf("%s: %w: %s", program, err, out)
			}
			if d := measure.Micros(time.Since(begin)) / 1e3; program == target {
				alone = append(alone, d)
			} else {
				nothing = append(nothing, d)
			}
		}
	}

	t := measure.NewTable("virsh start, in ms", "without the hook", "with it", "the hook's part, pairwise (quarter to three quarters)", "aim")
	aims := map[bool]float64{false: 5, true: 40}
	for _, isManaged := range []bool{false, true} {
		name := "not managed"
		if isManaged {
			name = "managed: shim started, module loaded"
		}
		without, with := took[way{isManaged, false}], took[way{isManaged, true}]
		parts := measure.Differences(with, without)
		t.Row(name, fmt.Sprintf("%.0f", measure.Median(without)), fmt.Sprintf("%.0f", measure.Median(with)),
			fmt.Sprintf("%+.1f (%+.0f to %+.0f)", measure.Median(parts), measure.Quantile(parts, 0.25), measure.Quantile(parts, 0.75)), fmt.Sprintf("%.0f", aims[isManaged]))
	}
	fmt.Fprintf(t, "\nMedians of %d starts each, in turns. Each start calls the hook three times, which a domain that isn't managed leaves at once: one such "+
		"call takes %.1f ms, where starting a program that does nothing takes %.1f ms.\n", len(took[ways[0]]), measure.Median(alone), measure.Median(nothing))
	return t.String(), nil
}
