// Package packages builds ftclock's packages for tests, and tests their life on whole Debians: what an operator does with
// a package, while domains run.
package packages

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tags are the versions that `make build/test/packages` builds for tests, the older one first.
var Tags = []string{"v1.0.0", "v1.1.0"}

// DebName is the file of a version's .deb.
func DebName(tag string) string { return "ftclock_" + strings.TrimPrefix(tag, "v") + "-1_amd64.deb" }

// Files are the packages that were built, by kind: deb and rpm.
type Files map[string]string

// Build makes the packages of what git knows of a repository, as it is now, with a tag as its version: v1.2.3. It is done in
// a new directory, so that the repository's own bin stays as it is. env is further environment.
func Build(repo, dir, tag string, env ...string) (Files, error) {
	repo, err := filepath.Abs(repo)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	const copied = `git -c safe.directory='*' ls-files -z -co --exclude-standard |
		xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' - | tar -c --null -T - | tar -x -C "$0"`
	checkout := exec.Command("sh", "-c", copied, dir)
	checkout.Dir = repo
	if out, err := checkout.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copying the sources: %w: %s", err, out)
	}
	cmd := exec.Command("make", "packages", "VERSION="+tag)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH=1790000000"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make packages: %w\n%s", err, out)
	}
	version := strings.TrimPrefix(tag, "v")
	files := Files{
		"deb": filepath.Join(dir, "build/packages", DebName(tag)),
		"rpm": filepath.Join(dir, "build/packages/ftclock-"+version+"-1.x86_64.rpm"),
	}
	for _, path := range files {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("make packages: %w", err)
		}
	}
	return files, nil
}
