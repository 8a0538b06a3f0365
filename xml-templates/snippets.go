package metadata

import (
	"embed"
	"fmt"
	"strings"
)

//go:embed snippets/*.xml
var snippets embed.FS

// Snippets returns the names of the examples that can be pasted into a domain, sorted.
func Snippets() (names []string) {
	files, err := snippets.ReadDir("snippets")
	if err != nil {
		panic(err) // the program was built without them
	}
	for _, f := range files {
		names = append(names, strings.TrimSuffix(f.Name(), ".xml"))
	}
	return names
}

// Snippet returns an example by its name.
func Snippet(name string) ([]byte, error) {
	b, err := snippets.ReadFile("snippets/" + name + ".xml")
	if err != nil {
		return nil, fmt.Errorf("reading snippet %q: want one of %s", shorten(name), strings.Join(Snippets(), ", "))
	}
	return b, nil
}
