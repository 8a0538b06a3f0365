package main

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"ftclock/test/built"
)

// goBenchmarks runs those of the packages on the path of a cont. The output is benchstat's input.
func (b *bench) goBenchmarks() (string, error) {
	cmd := exec.Command("go", "test", "-run", "^$", "-bench", ".", "-benchmem", "-count", pick(b, "5", "1"), "-benchtime", pick(b, "300ms", "10ms"),
		"./qmp-shim", "./clockpage")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go test: %w\n%s", err, out)
	}
	times := make(map[string][]float64)
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^Benchmark(\S+?)(?:-\d+)?\s+\d+\s+([0-9.]+) ns/op`).FindAllStringSubmatch(string(out), -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return "", err
		}
		if times[m[1]] == nil {
			names = append(names, m[1])
		}
		times[m[1]] = append(times[m[1]], v)
	}
	if len(names) == 0 {
		return "", fmt.Errorf("go test printed no benchmark:\n%s", out)
	}
	t := newTable("benchmark", "ns, median", "least", "what")
	what := map[string]string{
		"Recogniser": "a whole recorded conversation of libvirt and QEMU, 217 kB", "Order": "the order for a pause, from the cont's arrival until it is in the page",
		"Relay/query-status": "command and answer through the relay, with a client and a server in the same process", "Relay/cont": "the same with a cont, which is held for the order",
		"Socket": "command and answer over two sockets without a relay", "SetOrder": "the order's section written", "Now": "the module's section read",
		"Counts": "the module's counts read",
	}
	for _, name := range names {
		t.row(name, fmt.Sprintf("%.0f", median(times[name])), fmt.Sprintf("%.0f", quantile(times[name], 0)), what[name])
	}
	t.WriteString("\n`go test -run '^$' -bench . -benchmem -count 5 ./qmp-shim ./clockpage` prints what benchstat reads.\n")
	return t.String(), nil
}

// instructions counts those of the module at a cont, in a simulated host (qemu-plugin/testdata/cont.c).
func (b *bench) instructions() (string, error) {
	if _, err := exec.LookPath("valgrind"); err != nil {
		return "", unavailable("valgrind is not installed; fix: apt-get install valgrind")
	}
	program, err := built.Path(built.Instructions)
	if err != nil {
		return "", err
	}
	const times = 1000
	t := newTable("", "instructions", "ioctls", "readings of clocks")
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
			return "", fmt.Errorf("valgrind: %w\n%s", err, out)
		}
		said, ok := strings.CutPrefix(string(out), c.want)
		var asked [4]float64
		if _, err := fmt.Sscanf(said, "stop %g %g cont %g %g", &asked[0], &asked[1], &asked[2], &asked[3]); !ok || err != nil {
			return "", fmt.Errorf("the simulation says %q, not %q", out, c.want)
		}
		out, err = exec.Command("callgrind_annotate", "--threshold=100", "--auto=no", program+".callgrind").CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("callgrind_annotate: %w\n%s", err, out)
		}
		var own float64
		for _, m := range ofTheRule.FindAllStringSubmatch(string(out), -1) {
			n, err := strconv.ParseFloat(strings.ReplaceAll(m[1], ",", ""), 64)
			if err != nil {
				return "", err
			}
			own += n
		}
		if own < times {
			return "", errors.New("callgrind saw nothing of the rule")
		}
		t.row(c.name, fmt.Sprintf("%.0f", own/times), fmt.Sprintf("%.0f", asked[c.at]/times), fmt.Sprintf("%.0f", asked[c.at+1]/times))
	}
	t.WriteString("\nCounted by callgrind in the machine code as it is built for QEMU, the ioctls and the readings of clocks by the vDSO left out; a mean of 1,000. " +
		"The aim for a cont is 500.\n")
	return t.String(), nil
}

// ofTheRule is a line of callgrind_annotate: instructions of a function in rule.c, callees not included.
var ofTheRule = regexp.MustCompile(`(?m)^\s*([0-9,]+) \([ 0-9.]+%\)\s+\S*rule\.c:`)
