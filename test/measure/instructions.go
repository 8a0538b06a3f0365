package measure

import (
	"cmp"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
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
	Parts            []Part  // of Instructions, the largest first
}

// Part is what a function of the rule takes by itself, what the compiler put into it included.
type Part struct {
	Name         string
	Instructions float64
}

// Split words the parts.
func (c Counted) Split() string {
	var all []string
	for _, p := range c.Parts {
		if p.Instructions >= 0.5 {
			all = append(all, fmt.Sprintf("%s %.0f", p.Name, p.Instructions))
		}
	}
	return strings.Join(all, ", ")
}

// ofTheRule is a line of callgrind_annotate: instructions of a function of the rule, callees not included, by the file that they
// are written in.
var ofTheRule = regexp.MustCompile(`(?m)^\s*([0-9,]+) \([ 0-9.]+%\)\s+\S*/(rule\w*\.[ch]):(\w+)`)

// pageFile is the part of the rule that writes to the page and reads from it, put into all others by the compiler.
const pageFile, pagePart = "rule_page.h", "the page's sections, word by word"

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
		counted := Counted{Name: c.name, Ioctls: asked[c.at] / times, Readings: asked[c.at+1] / times}
		if counted.Parts, err = partsOf(string(out), times); err != nil {
			return nil, err
		}
		for _, p := range counted.Parts {
			counted.Instructions += p.Instructions
		}
		all = append(all, counted)
	}
	return all, nil
}

// partsOf reads what callgrind_annotate prints of so many calls.
func partsOf(annotated string, times float64) (all []Part, err error) {
	for _, m := range ofTheRule.FindAllStringSubmatch(annotated, -1) {
		n, err := strconv.ParseFloat(strings.ReplaceAll(m[1], ",", ""), 64)
		if err != nil {
			return nil, err
		}
		name := m[3]
		if m[2] == pageFile {
			name = pagePart
		}
		i := slices.IndexFunc(all, func(p Part) bool { return p.Name == name })
		if i < 0 {
			i, all = len(all), append(all, Part{Name: name})
		}
		all[i].Instructions += n / times
	}
	if len(all) == 0 {
		return nil, errors.New("callgrind saw nothing of the rule")
	}
	slices.SortStableFunc(all, func(a, b Part) int { return cmp.Compare(b.Instructions, a.Instructions) })
	return all, nil
}
