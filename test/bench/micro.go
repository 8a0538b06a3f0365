package main

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"

	"ftclock/test/measure"
)

// goBenchmarks runs those of the packages on the path of a cont. The output is benchstat's input.
func (b *bench) goBenchmarks() (string, error) {
	cmd := exec.Command("go", "test", "-run", "^$", "-bench", ".", "-benchmem", "-count", pick(b, "5", "1"), "-benchtime", pick(b, "300ms", "10ms"),
		"./relay", "./qmp-shim", "./clockpage")
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
	t := measure.NewTable("benchmark", "ns, median", "least", "what")
	what := map[string]string{
		"Recogniser": "a whole recorded conversation of libvirt and QEMU, 217 kB", "Order": "the order for a pause, from the cont's arrival until it is in the page",
		"Relay/query-status": "command and answer through the relay, with a client and a server in the same process", "Relay/cont": "the same with a cont, which is held for the order",
		"Socket": "command and answer over two sockets without a relay", "SetOrder": "the order's section written", "Now": "the module's section read",
		"Counts": "the module's counts read",
	}
	for _, name := range names {
		t.Row(name, fmt.Sprintf("%.0f", measure.Median(times[name])), fmt.Sprintf("%.0f", measure.Quantile(times[name], 0)), what[name])
	}
	t.WriteString("\n`go test -run '^$' -bench . -benchmem -count 5 ./relay ./qmp-shim ./clockpage` prints what benchstat reads.\n")
	return t.String(), nil
}

// instructions counts those of the module at a cont, in a simulated host (qemu-plugin/testdata/cont.c).
func (b *bench) instructions() (string, error) {
	counted, err := measure.Instructions()
	if errors.Is(err, measure.ErrNoValgrind) {
		return "", unavailable(err.Error())
	}
	if err != nil {
		return "", err
	}
	t := measure.NewTable("", "instructions", "ioctls", "readings of clocks")
	for _, c := range counted {
		t.Row(c.Name, fmt.Sprintf("%.0f", c.Instructions), fmt.Sprintf("%.0f", c.Ioctls), fmt.Sprintf("%.0f", c.Readings))
	}
	t.WriteString("\nCounted by callgrind in the machine code as it is built for QEMU, the ioctls and the readings of clocks by the vDSO left out; a mean of 1,000. " +
		"The aim for a cont is 500. By function:\n\n")
	for _, c := range counted {
		fmt.Fprintf(t, "- %s: %s\n", c.Name, c.Split())
	}
	return t.String(), nil
}
