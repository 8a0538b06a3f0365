package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"ftclock/policy"

	"github.com/alecthomas/kong"
)

var update = flag.Bool("update", false, "write the commands into the man page instead of comparing them")

const manPage = "../../packaging/man/ftclock.1"

// The man page's commands are what the program's own help says of them, word for word.
func TestManPage(t *testing.T) {
	text, err := os.ReadFile(manPage)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), ".\\\" begin\n")
	if !ok {
		t.Fatal("the page has no place for the commands")
	}
	commands, tail, ok := strings.Cut(rest, ".\\\" end\n")
	if !ok {
		t.Fatal("the place for the commands has no end")
	}
	want := manCommands(t)
	if *update {
		page := head + ".\\\" begin\n" + want + ".\\\" end\n" + tail
		if err := os.WriteFile(manPage, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if commands != want {
		t.Errorf("the page's commands aren't the program's: go test ./cmd/ftclock -run TestManPage -update\n%s", want)
	}
}

// manCommands words all commands in mdoc(7).
func manCommands(t *testing.T) string {
	parser, err := kong.New(&cli{}, kong.Vars{"version": "", "policies": policy.Dir})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString(".Bl -tag -width Ds\n")
	for _, command := range parser.Model.Children {
		if command.Hidden {
			continue
		}
		fmt.Fprintf(&b, ".It Xo\n.Cm %s\n", command.Name)
		for _, flag := range command.Flags {
			if flag.Hidden {
				continue
			}
			form := "Fl \\-" + flag.Name
			if !flag.IsBool() {
				form += " Ar " + flag.FormatPlaceHolder()
			}
			if !flag.Required {
				form = "Op " + form
			}
			b.WriteString("." + form + "\n")
		}
		for _, argument := range command.Positional {
			form := "Ar " + argument.Name
			if !argument.Required {
				form = "Op " + form
			}
			b.WriteString("." + form + "\n")
		}
		b.WriteString(".Xc\n")
		prose(&b, command.Help)
		if command.Detail != "" {
			prose(&b, command.Detail)
		}
		manArguments(&b, command)
	}
	b.WriteString(".El\n")
	return b.String()
}

// manArguments words what a command takes.
func manArguments(b *strings.Builder, command *kong.Node) {
	if len(command.Positional)+len(command.Flags) == 0 {
		return
	}
	b.WriteString(".Bl -tag -width Ds\n")
	for _, argument := range command.Positional {
		fmt.Fprintf(b, ".It Ar %s\n", argument.Name)
		prose(b, argument.Help)
	}
	for _, flag := range command.Flags {
		if flag.Hidden {
			continue
		}
		b.WriteString(".It Fl \\-" + flag.Name)
		if !flag.IsBool() {
			b.WriteString(" Ar " + flag.FormatPlaceHolder())
		}
		b.WriteString("\n")
		prose(b, flag.Help)
	}
	b.WriteString(".El\n")
}

// prose writes text as lines of mdoc: a sentence a line, nothing at a line's begin that troff would take for a request.
func prose(b *strings.Builder, text string) {
	text = strings.ReplaceAll(strings.TrimSpace(text), `\`, `\e`)
	text = strings.ReplaceAll(text, "\n", " ")
	for _, line := range strings.Split(strings.ReplaceAll(text, ". ", ".\n"), "\n") {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			line = `\&` + line
		}
		b.WriteString(strings.ReplaceAll(line, "--", `\-\-`) + "\n")
	}
}
