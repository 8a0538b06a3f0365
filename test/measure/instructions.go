package measure

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"ftclock/test/built"
)

// ErrNoValgrind says that instructions can't be counted here.
var ErrNoValgrind = errors.New("valgrind is not installed; fix: apt-get install valgrind")

// Counted is what the module does at a stop or at a cont: a mean of 1,000.
type Counted struct {
	Name             string
	Instructions     float64 // the module's own
	Ioctls, Readings float64 // of the kernel's clock, and of clocks by the vDSO
}

// ofTheRule is a line of callgrind_annotate: instructions of a function of the rule, callees not included.
var ofTheRule = regexp.MustCompile(`(?m)^\s*([0-9,]+) \([ 0-9.]+%\)\s+\S*/rule\w*\.[ch]:`)

// Instructions counts those of the module, in a simulated host (qemu-plugin/testdata/cont.c). It needs neither QEMU nor KVM.
func Instructions() (all []Counted, err error) {
	if _, err := exec.LookPath("valgrind"); err != nil {
		return nil, ErrNoValgrind
	}
	program, err := built.Path(built.Instructions)
	if err != nil {
		return nil, err
	}
	const times = 1000
	for _, c := range []struct {
		name, function, mode, want string
		at                         int
	}{
		{"stop", "rule_get_clock", "", "dropped 1000 anchored 0 ordered 1000 ", 0},
		{"cont, the write left out: the usual case", "rule_set_clock", "", "dropped 1000 anchored 0 ordered 1000 ", 2},
		{"cont, the anchor's value written", "rule_set_clock", "off", "dropped 1 anchored 999 ordered 1000 ", 2},
	} {
		args := []string{"-q", "--tool=callgrind", "--callgrind-out-file=" + program + ".callgrind", "--collect-atstart=no",
			"--toggle-collect=" + c.function, program, strconv.Itoa(times)}
		if c.mode != "" {
			args = append(args, c.mode)
		}
		out, err := exec.Command("valgrind", args...).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("valgrind: %w\n%s", err, out)
		}
		said, ok := strings.CutPrefix(string(out), c.want)
		var asked [4]float64
		if _, err := fmt.Sscanf(said, "stop %g %g cont %g %g", &asked[0], &asked[1], &asked[2], &asked[3]); !ok || err != nil {
			return nil, fmt.Errorf("the simulation says %q, not %q", out, c.want)
		}
		out, err = exec.Command("callgrind_annotate", "--threshold=100", "--auto=no", program+".callgrind").CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("callgrind_annotate: %w\n%s", err, out)
		}
		var own float64
		for _, m := range ofTheRule.FindAllStringSubmatch(string(out), -1) {
			n, err := strconv.ParseFloat(strings.ReplaceAll(m[1], ",", ""), 64)
			if err != nil {
				return nil, err
			}
			own += n
		}
		if own < times {
			return nil, errors.New("callgrind saw nothing of the rule")
		}
		all = append(all, Counted{c.name, own / times, asked[c.at] / times, asked[c.at+1] / times})
	}
	return all, nil
}
