// Command prepare builds the packages that test/packages installs: two versions of this tree, below the directory that is
// its argument.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"ftclock/test/packages"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "packages:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, tag := range packages.Tags {
		work, err := os.MkdirTemp("", "ftclock-packages-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(work)
		files, err := packages.Build(".", filepath.Join(work, tag), tag)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(files["deb"])
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, packages.DebName(tag)), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
