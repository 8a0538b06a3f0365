// Package kubevirt has tests alone: of the manifests beside it.
package kubevirt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"ftclock/test/check"
	metadata "ftclock/xml-templates"
)

// object is a Kubernetes object.
type object = map[string]any

// schemas are those of the kinds that the manifests have, by kind: see testdata/README.md.
func schemas(t *testing.T) map[string]*jsonschema.Schema {
	t.Helper()
	text := check.Value(os.ReadFile("testdata/schemas.json"))(t)
	doc := check.Value(jsonschema.UnmarshalJSON(bytes.NewReader(text)))(t)
	c := jsonschema.NewCompiler()
	check.NoError(t, c.AddResource("schemas.json", doc))
	var kinds struct{ Kinds map[string]any }
	check.NoError(t, json.Unmarshal(text, &kinds))
	all := map[string]*jsonschema.Schema{}
	for kind := range kinds.Kinds {
		all[kind] = check.Value(c.Compile("schemas.json#/kinds/" + kind))(t)
	}
	return all
}

// read gives the objects of a manifest.
func read(text []byte) (all []object, err error) {
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var o object
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, o)
	}
}

// validate checks the objects of a manifest against the schemas of their kinds.
func validate(text []byte, all map[string]*jsonschema.Schema) error {
	objects, err := read(text)
	if err != nil {
		return err
	}
	for _, o := range objects {
		kind := fmt.Sprint(o["kind"])
		schema := all[kind]
		if schema == nil {
			return errors.New("no schema of the kind " + kind)
		}
		text, err := json.Marshal(o)
		if err != nil {
			return err
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text)) // with the numbers of JSON
		if err != nil {
			return err
		}
		if err := schema.Validate(doc); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	return nil
}

// manifests are all there are, by name.
func manifests(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for _, name := range check.Value(filepath.Glob("*.yaml"))(t) {
		all[name] = check.Value(os.ReadFile(name))(t)
	}
	if len(all) != 3 {
		t.Fatalf("%d manifests", len(all))
	}
	return all
}

// Every field of every object is one that Kubernetes and KubeVirt have there, of the right type, and none that they ask for is missing.
func TestManifests(t *testing.T) {
	all := schemas(t)
	for name, text := range manifests(t) {
		if err := validate(text, all); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is wrong is seen.
func TestManifestsThatAreWrong(t *testing.T) {
	all, good := schemas(t), manifests(t)
	for _, c := range []struct{ file, before, after, want string }{
		{"node.yaml", "hostPID: true", "hostPid: true", "hostPid"},
		{"node.yaml", "hostPID: true", `hostPID: "yes"`, "boolean"},
		{"node.yaml", "          image:", "          picture:", "picture"},
		{"node.yaml", "        - name: ftclock\n", "        - title: ftclock\n", "name"},
		{"node.yaml", "            type: DirectoryOrCreate", "            kind: DirectoryOrCreate", "kind"},
		{"node.yaml", "defaultMode: 0644", "defaultMode: rw", "integer"},
		{"node.yaml", "              memory: 64Mi", "              memory: [64]", "memory"},
		{"node.yaml", "  selector:\n    matchLabels:\n      app.kubernetes.io/name: ftclock-node\n", "", "selector"},
		{"node.yaml", "\ndata:\n", "\ndata:\n  20-more.xml: {text: x}\n", "20-more.xml"},
		{"vmi.yaml", "      cores: 2", "      cores: two", "cores"},
		{"vmi.yaml", "            bus: virtio", "            buss: virtio", "buss"},
		{"vmi.yaml", "    memory:\n", "    memories:\n", "memories"},
		{"vmi.yaml", "  terminationGracePeriodSeconds: 30", "  terminationGracePeriod: 30", "terminationGracePeriod"},
		{"kubevirt.yaml", "featureGates:", "featuregates:", "featuregates"},
		{"kubevirt.yaml", "kind: KubeVirt", "kind: Kubevirt", "no schema"},
	} {
		wrong := strings.Replace(string(good[c.file]), c.before, c.after, 1)
		if wrong == string(good[c.file]) {
			t.Errorf("%s has no %q", c.file, c.before)
		} else if err := validate([]byte(wrong), all); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s with %q: %v, want %q", c.file, c.after, err, c.want)
		}
	}
}

// at is a value inside an object, by names and indices.
func at(t *testing.T, o any, path ...any) any {
	t.Helper()
	for _, step := range path {
		switch step := step.(type) {
		case string:
			o = o.(object)[step]
		case int:
			o = o.([]any)[step]
		}
		if o == nil {
			t.Fatalf("%v: no %v", path, step)
		}
	}
	return o
}

// What schemas don't know: the policy's files are right, each is mounted by itself, and pods are selected by their labels.
func TestNode(t *testing.T) {
	objects := check.Value(read(manifests(t)["node.yaml"]))(t)
	config, set := objects[1], objects[2]
	pod := at(t, set, "spec", "template", "spec")
	var mounted []string
	for _, m := range at(t, pod, "containers", 0, "volumeMounts").([]any) {
		if at(t, m, "name") == "policy" {
			name := at(t, m, "subPath").(string)
			mounted = append(mounted, name)
			if at(t, m, "mountPath") != "/etc/ftclock/policy.d/"+name {
				t.Errorf("%s is mounted at %v", name, at(t, m, "mountPath"))
			}
		}
	}
	for name, text := range at(t, config, "data").(object) {
		p, err := metadata.ParseHostPolicy([]byte(text.(string)))
		if err != nil || len(p.For) == 0 || !slices.Contains(mounted, name) {
			t.Errorf("%s: %v; mounted: %q", name, err, mounted)
		}
	}
	if want, got := at(t, set, "spec", "selector", "matchLabels"), at(t, set, "spec", "template", "metadata", "labels"); fmt.Sprint(want) != fmt.Sprint(got) {
		t.Errorf("selected by %v, labelled %v", want, got)
	}
	for _, field := range []string{"hostPID", "hostNetwork"} {
		if at(t, pod, field) != true {
			t.Errorf("%s isn't true", field)
		}
	}
	if at(t, pod, "volumes", 0, "configMap", "name") != at(t, config, "metadata", "name") {
		t.Error("another ConfigMap is mounted")
	}
}

// sidecar is an entry of KubeVirt's annotation hookSidecars: Hook, in its pkg/hooks.
type sidecar struct {
	Args            []string `json:"args,omitempty"`
	Command         []string `json:"command,omitempty"`
	Image           string   `json:"image,omitempty"`
	ImagePullPolicy string   `json:"imagePullPolicy,omitempty"`
}

// The example's annotations are those that the sidecar understands, and the page shows no others.
func TestVMI(t *testing.T) {
	objects := check.Value(read(manifests(t)["vmi.yaml"]))(t)
	annotations := at(t, objects[0], "metadata", "annotations").(object)
	d := json.NewDecoder(strings.NewReader(annotations["hooks.kubevirt.io/hookSidecars"].(string)))
	d.DisallowUnknownFields()
	var all []sidecar
	if err := d.Decode(&all); err != nil || len(all) != 1 || !slices.Equal(all[0].Args, []string{"--version", "v1alpha3"}) {
		t.Errorf("the sidecars: %+v, %v", all, err)
	}
	if p, err := metadata.ParseElement([]byte(annotations["ftclock.io/clock"].(string))); err != nil || p == metadata.Default() {
		t.Errorf("the clock: %+v, %v", p, err)
	}
	source := string(check.Value(os.ReadFile("../../cmd/ftclock-kubevirt/define.go"))(t))
	page := string(check.Value(os.ReadFile("README.md"))(t))
	for _, name := range append(regexp.MustCompile(`ftclock\.io/[\w-]+`).FindAllString(page, -1), "ftclock.io/clock", "ftclock.io/on-error") {
		if !strings.Contains(source, `= annotations + "`+strings.TrimPrefix(name, "ftclock.io/")+`"`) || !strings.Contains(page, name) || annotations[name] == nil {
			t.Errorf("%s isn't in all of the program, the page and the example", name)
		}
	}
}
