package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"ftclock/host"
	metadata "ftclock/xml-templates"
)

// The annotations of a VMI.
const (
	annotations = "ftclock.io/"
	// clockAnnotation is on, off or the clock element of the metadata. Without it nothing is done.
	clockAnnotation = annotations + "clock"
	// errorAnnotation says what happens to a VMI whose annotations are wrong: start or refuse.
	errorAnnotation = annotations + "on-error"
)

// vmi is what we read of a VMI.
type vmi struct {
	Metadata struct {
		Name, Namespace string
		Annotations     map[string]string
	}
}

// run prints the domain, and says what it did. It ends with 1, upon which KubeVirt doesn't start the VMI, if that is asked for or
// there is no domain to print.
func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("onDefineDomain", flag.ContinueOnError)
	flags.SetOutput(stderr)
	vmiJSON := flags.String("vmi", "", "the VMI, as JSON")
	domain := flags.String("domain", "", "the domain, as XML")
	if err := flags.Parse(args); err != nil {
		return 1
	}
	if *domain == "" || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "ftclock: usage: onDefineDomain --vmi JSON --domain XML, as KubeVirt's sidecar-shim calls it")
		return 1
	}
	var v vmi
	out, note, err := []byte(*domain), "", error(nil)
	if err = json.Unmarshal([]byte(*vmiJSON), &v); err != nil {
		err = fmt.Errorf("reading the VMI: %w", err)
	} else if out, note, err = define([]byte(*domain), v.Metadata.Annotations); err != nil {
		err = fmt.Errorf("VMI %s/%s: %w", v.Metadata.Namespace, v.Metadata.Name, err)
	}
	if err != nil && v.Metadata.Annotations[errorAnnotation] == "refuse" {
		fmt.Fprintf(stderr, "ftclock: %s; it doesn't start, as %s says\n", host.ErrorLine(err), errorAnnotation)
		return 1
	}
	if err != nil {
		out, note = []byte(*domain), host.ErrorLine(err)+"; it starts with an uncorrected clock; fix: correct the annotation, and restart the VM"
	}
	if note != "" {
		fmt.Fprintf(stderr, "ftclock: %s\n", note)
	}
	if _, err := stdout.Write(out); err != nil {
		fmt.Fprintf(stderr, "ftclock: printing the domain: %v\n", err)
		return 1
	}
	return 0
}

// define gives the domain as the annotations want it, and what there is to say.
func define(domain []byte, all map[string]string) (out []byte, note string, err error) {
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if strings.HasPrefix(name, annotations) && name != clockAnnotation && name != errorAnnotation {
			return nil, "", fmt.Errorf("unknown annotation %q; allowed: %s, %s", name, clockAnnotation, errorAnnotation)
		}
	}
	if value, there := all[errorAnnotation]; there && value != "start" && value != "refuse" {
		return nil, "", fmt.Errorf("annotation %s: unknown value %q; allowed: start, refuse", errorAnnotation, value)
	}
	value, there := all[clockAnnotation]
	switch value = strings.TrimSpace(value); {
	case !there, value == "off":
		return domain, "", nil
	case value == "on":
		out, err = metadata.Enable(domain, metadata.EditOptions{Policy: metadata.Default()})
	case strings.HasPrefix(value, "<"):
		var p metadata.Policy
		if p, err = metadata.ParseElement([]byte(value)); err != nil {
			return nil, "", fmt.Errorf("annotation %s: %w", clockAnnotation, err)
		}
		out, err = metadata.Enable(domain, metadata.EditOptions{Policy: p})
	default:
		return nil, "", fmt.Errorf(`annotation %s: unknown value %q; allowed: on, off, or an element such as <clock reference="utc"/>`, clockAnnotation, value)
	}
	if err != nil {
		return nil, "", fmt.Errorf("writing the metadata: %w", err)
	}
	return out, "the domain has the metadata that " + clockAnnotation + " asks for", nil
}
