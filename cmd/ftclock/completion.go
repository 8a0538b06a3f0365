package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"ftclock/cmd/ftclock/internal/hypervisor"

	"github.com/alecthomas/kong"
)

// completing gives the command line that a shell wants completed: COMP_LINE, up to the byte COMP_POINT
// (bash(1), complete -C). The scripts for the shells are in packaging/completions.
func completing(getenv func(string) string) (line string, asked bool) {
	line = getenv("COMP_LINE")
	if point, err := strconv.Atoi(getenv("COMP_POINT")); err == nil && point >= 0 && point < len(line) {
		line = line[:point]
	}
	return line, line != ""
}

// complete prints the words that can come next on the command line, one a line.
func complete(out io.Writer, app *kong.Node, line string) {
	words := strings.Fields(line)
	if strings.HasSuffix(line, " ") || len(words) < 2 {
		words = append(words, "")
	}
	node, position := app, 0
	var option *kong.Flag // whose value comes next
	for _, word := range words[1 : len(words)-1] {
		child := slices.IndexFunc(node.Children, func(n *kong.Node) bool { return n.Name == word })
		switch {
		case option != nil:
			option = nil
		case strings.HasPrefix(word, "-"):
			option = valueOf(node, word)
		case child >= 0:
			node = node.Children[child]
		default:
			position++
		}
	}
	last := words[len(words)-1]
	if name, value, ok := strings.Cut(last, "="); ok {
		option, last = valueOf(node, name), value
	}
	for _, word := range candidates(node, option, position, last) {
		if strings.HasPrefix(word, last) {
			fmt.Fprintln(out, word)
		}
	}
}

// valueOf gives the option that a word names, if it takes a value.
func valueOf(node *kong.Node, word string) *kong.Flag {
	for _, f := range slices.Concat(node.AllFlags(true)...) {
		if !f.IsBool() && (word == "--"+f.Name || f.Short != 0 && word == "-"+string(f.Short)) {
			return f
		}
	}
	return nil
}

// candidates are the words that fit: values of an option, options, commands, or domains.
func candidates(node *kong.Node, option *kong.Flag, position int, last string) (words []string) {
	switch {
	case option != nil:
		if option.Enum != "" {
			words = option.EnumSlice()
		}
	case strings.HasPrefix(last, "-"):
		for _, f := range slices.Concat(node.AllFlags(true)...) {
			words = append(words, "--"+f.Name)
		}
	case position < len(node.Positional) && node.Positional[position].Tag.Get("predictor") == "domain":
		words = hypervisor.DomainNames()
	default:
		for _, child := range node.Children {
			words = append(words, child.Name)
		}
	}
	return words
}
