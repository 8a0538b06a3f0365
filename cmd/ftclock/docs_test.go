package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ftclock/policy"

	"github.com/alecthomas/kong"
)

// Each command of ours that a page mentions in passing is one that the program understands. (test/docs runs those in blocks.)
func TestDocsSpeakTheCommandLine(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal("no pages", err)
	}
	var c cli
	parser, err := kong.New(&c, kong.Name("ftclock"), kong.Vars{"version": "", "policies": policy.Dir}, kong.Exit(func(int) {}))
	if err != nil {
		t.Fatal(err)
	}
	commands := map[string]bool{}
	for _, node := range parser.Model.Children {
		commands[node.Name] = true
	}
	span := regexp.MustCompile("`(?:sudo )?ftclock ([^`]+)`")
	seen := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range span.FindAllStringSubmatch(strings.ReplaceAll(string(text), "\n", " "), -1) {
			line, _, _ := strings.Cut(found[1], "|")
			args := strings.Fields(line)
			if len(args) == 1 && commands[args[0]] {
				seen++
				continue // a command's name, not a whole line
			}
			for i, arg := range args { // a placeholder of a pid is a number
				if arg == "PID" {
					args[i] = "4711"
				}
			}
			// A line may be told without its domain, not with an option that there isn't.
			if _, err := parser.Parse(args); err != nil && !strings.Contains(err.Error(), "<domain>") {
				t.Errorf("%s: `ftclock %s`: %v", page, found[1], err)
			}
			seen++
		}
	}
	if seen < 20 {
		t.Errorf("%d commands found", seen)
	}
}
